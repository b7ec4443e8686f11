"""Sensors of this machine: heat, clocks, power, battery, load and memory.

``Sensors`` reads everything.  ``Signal`` is one value of one sensor.  ``Readings`` is the summary that a controller
uses; ``aggregate`` makes it from signals.

>>> from mbq_runtime.sensing import Kind, Sensors, Signal, aggregate
>>> type(Sensors().read()).__name__
'Readings'
>>> zone = Signal(Kind.HEAT, "cpu-thermal", 61.0, "/sys/class/thermal/thermal_zone0/temp", limit=80.0)
>>> readings = aggregate([zone], time_s=0.0)
>>> readings.temp_c, readings.throttle_temp_c, readings.power_w
(61.0, 80.0, None)
"""

from __future__ import annotations

from .aggregate import aggregate, power
from .readings import Readings
from .sensors import Sensors
from .signal import Kind, Signal

__all__ = ["Kind", "Readings", "Sensors", "Signal", "aggregate", "power"]
