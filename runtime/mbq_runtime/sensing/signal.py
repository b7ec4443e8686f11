"""One value of one sensor, or the reason why there is none."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What a signal tells; ``aggregate.aggregate`` goes by this, never by where a value was found."""

    HEAT = "heat"  # of the processor or a part beside it
    TEMPERATURE = "temperature"  # of anything else: disks, radios, batteries
    HEAT_LIMIT = "heat limit"
    SLOWED = "slowed"  # steps by which the kernel slows a processor to cool it
    COOLING = "cooling"  # steps of a fan and the like
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
    MISSING = "missing"  # a whole source this board does not have
    CHIP = "chip"  # a device that has not said yet what it measures


class ValidRange(NamedTuple):
    """unit, and the lowest and highest value to be believed in it."""

    unit: str
    low: float = 0.0
    high: float = math.inf


_TEMPERATURE = ValidRange("C", -40, 150)
_WATTS = ValidRange("W", 0, 2000)
_SHARE = ValidRange("share", 0, 1)
_FLAG = ValidRange("flag", 0, 1)
_STEPS = ValidRange("steps", -1)  # intel_powerclamp says -1 when it rests
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
    """What one sensor said.

    name: the sensor's own, such as "cpu-thermal"; value: None when unknown, and then ``problem`` says
    why; source: the file or command it came from; limit: the value from which the board acts by itself,
    or the most there can be; hard_limit: where it switches off; note: what else there is to know;
    age_s: how long ago it was read.
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
        return VALID_RANGES[self.kind].unit


def signal(
    kind: Kind,
    name: str,
    value: float,
    source: str,
    limit: float | None = None,
    hard_limit: float | None = None,
    note: str = "",
) -> Signal:
    """A signal of ``value``; of None when that cannot be true."""
    odd = doubt(kind, value)
    return Signal(kind, name, None if odd else float(value), source, limit, hard_limit, note, odd)


def doubt(kind: Kind, value: float) -> str | None:
    """Why ``value`` is not to be believed; None when it is."""
    unit, low, high = VALID_RANGES[kind]
    if not (math.isfinite(value) and low <= value <= high):
        return f"{value:g} {unit} cannot be true"
    if VALID_RANGES[kind] is _TEMPERATURE and abs(value) < 1:
        # Switched-off sensors say 0, and a board in degrees instead of thousandths would look ice-cold.
        return f"{value:g} C: the sensor is off, or does not count in thousandths of a degree"
    return None
