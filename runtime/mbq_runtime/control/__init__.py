"""Adaptive precision: policies, triggers, the controller, and the governor that connects them to an engine.

A policy and a controller step are pure, so a program can try them on made-up readings:

>>> from dataclasses import replace
>>> from mbq_runtime.control import find_policy, start, step
>>> from mbq_runtime.sensing import Readings
>>> policy = replace(find_policy("auto"), floor_bits=4.0, ceiling_bits=8.0)
>>> hot = Readings(time_s=0.0, temp_c=79.0, throttle_temp_c=80.0)
>>> state = start(policy)
>>> for second in range(3):
...     state, budget, reason = step(state, hot, now=float(second), policy=policy)
>>> budget, reason
(6.0, 'heat: 79.0 C, the limit is 80 C')

A governor does this with real sensors and a loaded engine:

>>> from mbq_runtime import Engine
>>> from mbq_runtime.control import Governor
>>> from mbq_runtime.sensing import Sensors
>>> engine = Engine.load("my-bundle")
>>> with Governor(engine, Sensors(), find_policy("auto")):
...     print(engine.generate("Tell me a story").text())
Hi, wörld!
"""

from __future__ import annotations

from .bounds import BoundedEngine
from .controller import Decision, State, start, step
from .events import Event, JsonLines
from .governor import Governor, Status
from .ladder import RUNGS, Ladder, Rung, climb
from .metered_reply import MeteredReply, Piece
from .policy import POLICIES, Band, Policy, find_policy
from .triggers import TRIGGERS, Trigger

__all__ = [
    "POLICIES", "RUNGS", "TRIGGERS", "Band", "BoundedEngine", "Decision", "Event", "Governor", "JsonLines", "Ladder",
    "MeteredReply", "Piece", "Policy", "Rung", "State", "Status", "Trigger", "climb", "find_policy", "start", "step",
]  # fmt: skip
