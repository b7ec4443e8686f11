"""What the board tells of itself: ``Sensors`` reads it all, ``Readings`` is what a controller sees of it.

>>> from mbq_runtime.sensing import Sensors
>>> sensors = Sensors()
>>> sensors.read().available_cpus is not None                               # doctest: +SKIP
True
"""

from __future__ import annotations

from .aggregate import aggregate, power
from .readings import Readings
from .sensors import Sensors
from .signal import Kind, Signal

__all__ = ["Kind", "Readings", "Sensors", "Signal", "aggregate", "power"]
