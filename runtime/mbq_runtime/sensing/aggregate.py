"""Makes readings from signals.  A reading that is not certain is None.

When one signal of a kind is unknown, the minimum, maximum and sum of this kind are unknown too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from .raspberry import CAPPED, SOFT_LIMIT, THROTTLED, UNDERVOLTAGE
from .readings import Readings
from .signal import Kind, Signal

# Zones of the processor.  A zone without a name of its own can be one.
_PROCESSOR_ZONE = re.compile(r"cpu|core|soc|pkg|package|tj-|tctl|thermal_zone", re.I)
# Rails that feed the whole board.  The other rails are parts of them.
_WHOLE_BOARD_RAILS = frozenset({"VDD_IN", "POM_5V_IN", "VIN"})
# Sensors for a part of the machine, the largest part first.  The sensors of one row are added.
_PARTS = (re.compile("psys"), re.compile(r"package-\d+|dram"), re.compile("PMIC rails"))


def aggregate(signals: Sequence[Signal], time_s: float) -> Readings:
    """The readings of one moment.  ``tokens_per_s`` stays None; the governor adds it.

    Args:
        signals: what ``Sensors.signals`` returned.
        time_s: time of the signals, in s on a monotonic clock.
    """
    hottest = _hottest(signals) or Signal(Kind.HEAT, "", None, "")
    clocks = [one.value / one.limit if one.value is not None and one.limit else None
              for one in _of(signals, Kind.CLOCK_LIMIT)]  # fmt: skip
    memory = _together(min, _values(signals, Kind.MEMORY))
    watts, _ = power(signals)
    return Readings(
        time_s=time_s,
        temp_c=hottest.value,
        throttle_temp_c=hottest.limit,
        critical_temp_c=hottest.hard_limit,
        heat_throttled=_any(
            [_heat_bits(bits) for bits in _values(signals, Kind.THROTTLE_BITS)],
            _values(signals, Kind.SLOWED),
            _values(signals, Kind.THROTTLE_EVENTS),
        ),
        undervoltage=_any(
            [None if bits is None else int(bits) & UNDERVOLTAGE for bits in _values(signals, Kind.THROTTLE_BITS)],
            _values(signals, Kind.SUPPLY_ALARM),
        ),
        cpu_freq_fraction=_together(min, [*clocks, 1.0]) if clocks else None,
        discharging=_discharging(signals),
        battery_fraction=_battery_fraction(signals),
        battery_energy_wh=_together(sum, _values(signals, Kind.BATTERY_ENERGY)),
        power_w=watts,
        foreign_cpu_fraction=_together(max, _values(signals, Kind.FOREIGN_LOAD)),
        cpu_pressure=_together(max, _values(signals, Kind.CPU_PRESSURE)),
        available_cpus=_together(min, _values(signals, Kind.PROCESSORS)),
        cgroup_throttled_fraction=_together(max, _values(signals, Kind.GROUP_THROTTLING)),
        available_memory_bytes=None if memory is None else int(memory),
    )


def power(signals: Sequence[Signal]) -> tuple[float | None, str]:
    """The power of the largest part of the machine that has sensors.

    >>> power([Signal(Kind.POWER, "VDD_IN", 6.5, "hwmon1"), Signal(Kind.POWER, "VDD_CPU", 2.0, "hwmon1")])
    (6.5, 'VDD_IN')

    Args:
        signals: what ``Sensors.signals`` returned.

    Returns:
        (power in W, names of the sensors), or (None, reason) when it is unknown.
    """
    rails = _of(signals, Kind.POWER)
    whole = [rail for rail in rails if rail.name in _WHOLE_BOARD_RAILS]
    choices = [whole or rails]
    if _discharging(signals):
        choices.append(_of(signals, Kind.BATTERY_POWER))
    parts = _of(signals, Kind.PROCESSOR_POWER)
    choices += [[part for part in parts if row.fullmatch(part.name)] for row in _PARTS]
    for choice in filter(None, choices):
        if (watts := _together(sum, [one.value for one in choice])) is not None:
            return watts, " + ".join(one.name for one in choice)
    problems = [f"{one.name}: {one.problem}" for choice in choices for one in choice if one.value is None]
    return None, problems[0] if problems else "no power sensor"


def _hottest(signals: Sequence[Signal]) -> Signal | None:
    """The zone nearest to its limit.  None when no zone of the processor can be read: other zones can be cooler."""
    zones = _of(signals, Kind.HEAT)
    board_c = _together(min, _values(signals, Kind.HEAT_LIMIT))
    near = [replace(zone, limit=zone.limit or board_c) for zone in zones if _PROCESSOR_ZONE.search(zone.name)]
    others = [zone for zone in zones if not _PROCESSOR_ZONE.search(zone.name)]
    read = [zone for zone in near if zone.value is not None]
    if near and not read:
        return None
    if not near or any(_headroom_c(zone) is not None for zone in read):
        read += [zone for zone in others if zone.value is not None]
    limited = [(room, zone) for zone in read if (room := _headroom_c(zone)) is not None]
    if limited:
        return min(limited, key=lambda pair: pair[0])[1]
    return max(read, key=lambda zone: zone.value or 0.0, default=None)


def _headroom_c(zone: Signal) -> float | None:
    limit = zone.limit or zone.hard_limit
    return None if zone.value is None or limit is None else limit - zone.value


def _heat_bits(bits: float | None) -> bool | None:
    """Whether heat slows the board.  Under-voltage limits the clock too; then only the temperature bit means heat."""
    if bits is None:
        return None
    word = int(bits)
    return bool(word & SOFT_LIMIT or (word & (CAPPED | THROTTLED) and not word & UNDERVOLTAGE))


def _discharging(signals: Sequence[Signal]) -> bool | None:
    batteries = _values(signals, Kind.DISCHARGING)
    mains = _values(signals, Kind.MAINS)
    if any(batteries):
        return True
    if any(mains):
        return False
    if None in batteries:  # the driver does not know; without a charger the battery must be in use
        return True if mains and None not in mains else None
    return False if batteries else None


def _battery_fraction(signals: Sequence[Signal]) -> float | None:
    shares, energies = _values(signals, Kind.BATTERY), _of(signals, Kind.BATTERY_ENERGY)
    if len(shares) <= 1:
        return _together(max, shares)
    left = _together(sum, [one.value for one in energies])
    full = _together(sum, [one.limit for one in energies])
    return left / full if left is not None and full and len(energies) == len(shares) else None


def _of(signals: Iterable[Signal], kind: Kind) -> list[Signal]:
    return [one for one in signals if one.kind is kind]


def _values(signals: Iterable[Signal], kind: Kind) -> list[float | None]:
    return [one.value for one in signals if one.kind is kind]


def _together(what: Callable[[list[float]], float], values: Iterable[float | None]) -> float | None:
    """The result of a function of the values; None when there are no values or one is unknown."""
    known = list(values)
    return what([value for value in known if value is not None]) if known and None not in known else None


def _any(*ways: Sequence[float | None]) -> bool | None:
    """Combines several ways to find one fact: True when one way says yes, False when one way says no for certain."""
    if any(any(way) for way in ways):
        return True
    return False if any(way and None not in way for way in ways) else None
