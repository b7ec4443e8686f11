"""Signals: one value of one sensor, or the reason for a missing value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What a signal measures.  ``aggregate`` uses only this, never the place of the sensor."""

    HEAT = "heat"  # temperature of the processor or a part near it
    TEMPERATURE = "temperature"  # of other parts: disks, radios, batteries
    HEAT_LIMIT = "heat limit"
    SLOWED = "slowed"  # steps by which the kernel slows a processor to cool it
    COOLING = "cooling"  # steps of a fan or a similar device
    THROTTLE_EVENTS = "throttle events"
    THROTTLE_BITS = "throttle bits"
    SUPPLY_ALARM = "supply alarm"
    CLOCK_LIMIT = "clock limit"
    CLOCK = "clock"
    POWER = "power"
    PROCESSOR_POWER = "processor power"
    OTHER_POWER = "other power"
    FAN = "fan"
    BATTERY = "battery"
    BATTERY_ENERGY = "battery energy"
    BATTERY_POWER = "battery power"
    DISCHARGING = "discharging"
    MAINS = "mains"
    GPU_LOAD = "GPU load"
    GPU_CLOCK = "GPU clock"
    CPU_PRESSURE = "CPU pressure"
    MEMORY_PRESSURE = "memory pressure"
    IO_PRESSURE = "I/O pressure"
    FOREIGN_LOAD = "foreign load"
    OWN_LOAD = "own load"
    PROCESSORS = "processors"
    GROUP_THROTTLING = "group throttling"
    MEMORY = "memory"
    MISSING = "missing"  # a kind of sensor that this board does not have
    CHIP = "chip"  # a device whose purpose is not known yet


class ValidRange(NamedTuple):
    """The plausible values of a kind of signal.

    unit: unit of the value; low: lowest plausible value; high: highest plausible value.
    """

    unit: str
    low: float = 0.0
    high: float = math.inf


_TEMPERATURE = ValidRange("C", -40, 150)
_WATTS = ValidRange("W", 0, 2000)
_SHARE = ValidRange("share", 0, 1)
_FLAG = ValidRange("flag", 0, 1)
_STEPS = ValidRange("steps", -1)  # intel_powerclamp gives -1 when it is idle
_MEGAHERTZ = ValidRange("MHz", 1, 20_000)

VALID_RANGES = {
    Kind.HEAT: _TEMPERATURE,
    Kind.TEMPERATURE: _TEMPERATURE,
    Kind.HEAT_LIMIT: _TEMPERATURE,
    Kind.SLOWED: _STEPS,
    Kind.COOLING: _STEPS,
    Kind.THROTTLE_EVENTS: ValidRange("events"),
    Kind.THROTTLE_BITS: ValidRange("bits", 0, 2**32 - 1),
    Kind.SUPPLY_ALARM: _FLAG,
    Kind.CLOCK_LIMIT: _MEGAHERTZ,
    Kind.CLOCK: _MEGAHERTZ,
    Kind.POWER: _WATTS,
    Kind.PROCESSOR_POWER: _WATTS,
    Kind.OTHER_POWER: _WATTS,
    Kind.FAN: ValidRange("rpm", 0, 100_000),
    Kind.BATTERY: _SHARE,
    Kind.BATTERY_ENERGY: ValidRange("Wh", 0, 100_000),
    Kind.BATTERY_POWER: _WATTS,
    Kind.DISCHARGING: _FLAG,
    Kind.MAINS: _FLAG,
    Kind.GPU_LOAD: _SHARE,
    Kind.GPU_CLOCK: ValidRange("MHz", 0, 20_000),
    Kind.CPU_PRESSURE: _SHARE,
    Kind.MEMORY_PRESSURE: _SHARE,
    Kind.IO_PRESSURE: _SHARE,
    Kind.FOREIGN_LOAD: _SHARE,
    Kind.OWN_LOAD: ValidRange("CPUs", 0, 10_000),
    Kind.PROCESSORS: ValidRange("CPUs", 0.001, 10_000),
    Kind.GROUP_THROTTLING: _SHARE,
    Kind.MEMORY: ValidRange("bytes", 0, 2.0**50),
    Kind.MISSING: ValidRange(""),
    Kind.CHIP: ValidRange(""),
}


@dataclass(frozen=True)
class Signal:
    """One value of one sensor.

    >>> Signal(Kind.HEAT, "cpu-thermal", 61.0, "/sys/class/thermal/thermal_zone0/temp", limit=80.0).unit
    'C'

    Args:
        kind: what it measures.
        name: name of the sensor, such as "cpu-thermal".
        value: the value, in the unit of ``kind``; None is unknown.
        source: the file or command that gave the value.
        limit: value from which the board acts by itself, or the largest possible value.
        hard_limit: value at which the board switches off.
        note: more information, as text for people.
        problem: the reason why the value is unknown; None when it is known.
        age_s: time in s since it was read.
    """

    kind: Kind
    name: str
    value: float | None
    source: str
    limit: float | None = None
    hard_limit: float | None = None
    note: str = ""
    problem: str | None = None
    age_s: float = 0.0

    @property
    def unit(self) -> str:
        """Unit of the value."""
        return VALID_RANGES[self.kind].unit


def signal(
    kind: Kind,
    name: str,
    value: float,
    source: str,
    *,
    limit: float | None = None,
    hard_limit: float | None = None,
    note: str = "",
) -> Signal:
    """A signal; its value is None, with a problem, when the number is not plausible.

    Args:
        kind: see ``Signal``.
        name: see ``Signal``.
        value: the number that was read, in the unit of ``kind``.
        source: see ``Signal``.
        limit: see ``Signal``.
        hard_limit: see ``Signal``.
        note: see ``Signal``.
    """
    odd = doubt(kind, value)
    known = None if odd else float(value)
    return Signal(kind, name, known, source, limit=limit, hard_limit=hard_limit, note=note, problem=odd)


def doubt(kind: Kind, value: float) -> str | None:
    """The reason why a value is not plausible; None when it is plausible.

    Args:
        kind: what it measures.
        value: the value, in the unit of ``kind``.
    """
    unit, low, high = VALID_RANGES[kind]
    if not (math.isfinite(value) and low <= value <= high):
        return f"{value:g} {unit} is not plausible"
    if VALID_RANGES[kind] is _TEMPERATURE and abs(value) < 1:
        # A sensor that is off gives 0.  A driver that counts in degrees would look like 0.05 C.
        return f"{value:g} C: the sensor is off, or does not count in thousandths of a degree"
    return None
