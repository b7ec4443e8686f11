"""From readings to a budget: policies, the pure step, events, and the governor that ties them to an engine.

>>> from mbq_runtime.control import POLICIES, Governor
>>> from mbq_runtime.sensing import Sensors
>>> with Governor(engine, Sensors(), POLICIES["auto"]):                     # doctest: +SKIP
...     print(engine.generate("Tell me a story").text())
"""

from __future__ import annotations

from .events import Event, JsonLines
from .governor import Governor, Status
from .policy import POLICIES, Policy, find_policy

__all__ = ["POLICIES", "Event", "Governor", "JsonLines", "Policy", "Status", "find_policy"]
