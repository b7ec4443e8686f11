"""The wishes of the triggers: the highest budget that is enough for each, by its need or by its band."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mbq_runtime.sensing.readings import Readings

from .tracks import HOLD_S, Track
from .triggers import TRIGGERS, Situation

STEP_BITS = 0.5
"""Distance between two budgets in bits.  A budget is the floor plus a multiple of this, or the ceiling."""

_HYSTERESIS = 0.08  # pressure that is added when a rise is considered
_CONFIRM_S = 1.0  # a pressure must last this long before the budget falls
_APART_S, _KNOWN_APART_S = 20.0, 10.0  # time between a change and a small fall


@dataclass(frozen=True)
class Wish:
    """What one trigger wants.  Budgets are in average bits per weight.

    Args:
        name: the trigger.
        target: highest budget that is enough; the budget falls to it.
        allowed: highest budget that is enough with some room; the budget can rise to it.
        slows: whether the signal is one that slows the board now, so that nothing can be learned about its speed.
        known: whether the trigger's need gave it, and not its band.
        confirm_s: how long it must last before the budget falls, in s.
        settle_s: time in s after a change before it can lower the budget much.
        apart_s: time in s after a change before it can lower the budget by less than 1 bit.
    """

    name: str
    target: float
    allowed: float
    slows: bool
    known: bool
    confirm_s: float
    settle_s: float
    apart_s: float


def grid(low: float, high: float) -> list[float]:
    """The budgets that a controller uses, from the highest to the lowest.

    >>> grid(3.35, 4.5)
    [4.5, 4.35, 3.85, 3.35]

    Args:
        low: the floor, in average bits per weight.
        high: the ceiling, in average bits per weight.
    """
    count = math.ceil((high - low) / STEP_BITS - 1e-9)
    return [high, *(low + i * STEP_BITS for i in reversed(range(count)))]


def wishes(tracks: Mapping[str, Track], at: Situation, clock_s: float) -> list[Wish]:
    """The wish of each trigger whose signal has a value of the last ``HOLD_S`` seconds.

    Args:
        tracks: the signals, by trigger name.
        at: what a need can use.
        clock_s: time on the controller's clock, in s.
    """
    return [
        _wish(name, track, at)
        for name in at.policy.bands
        if (track := tracks.get(name)) is not None and clock_s - track.at_s <= HOLD_S
    ]


def _wish(name: str, track: Track, at: Situation) -> Wish:
    trigger, (low, high) = TRIGGERS[name], at.policy.bounds
    acts = track.latest > trigger.gate
    slows = trigger.slows and acts
    if trigger.need is not None:
        budgets = grid(low, high)
        needed = trigger.need(at, budgets, 0.0) if acts else high
        roomy = trigger.need(at, budgets, trigger.room) if acts else high
        if needed is not None and roomy is not None:
            return Wish(name, needed, roomy, slows, True, trigger.confirm_s, trigger.settle_s, _KNOWN_APART_S)
    ahead = min(max(track.slope * trigger.forecast_s, 0.0), trigger.forecast_most)
    pressure = at.policy.bands[name].pressure(track.value + ahead)
    allowed = _target(pressure + _HYSTERESIS, low, high) if pressure > 0 else high
    return Wish(name, _target(pressure, low, high), allowed, slows, False, _CONFIRM_S, trigger.settle_s, _APART_S)


def _target(pressure: float, low: float, high: float) -> float:
    """The budget at a pressure: the floor plus a multiple of ``STEP_BITS``, or the ceiling."""
    if pressure <= 0:
        return high
    return low + max(math.floor((1 - pressure) * (high - low) / STEP_BITS + 1e-9), 0) * STEP_BITS


def describe(wish: Wish, readings: Readings, at: Situation, bits: float) -> str:
    """The reason that a wish gives, as text for people.

    Args:
        wish: the wish.
        readings: the readings that gave the trigger's value.
        at: what a need can use.
        bits: the budget, in average bits per weight.
    """
    trigger = TRIGGERS[wish.name]
    if wish.known and trigger.describe_need is not None:
        return f"{wish.name}: {trigger.describe_need(at, readings)}: {bits:g} bits"
    return trigger.describe(readings)
