"""The controller: one pure function from what is known to the budget of the next tokens.

Each signal of ``TRIGGERS`` becomes a pressure from 0 to 1; the strongest one sets the budget, between the
policy's ceiling (no pressure) and floor (full pressure).  The budget falls within seconds and rises
after a time of calm, which doubles when a rise turns out to have been too early.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

from mbq_runtime.sensing.readings import Readings

from .policy import Policy
from .triggers import TRIGGERS, Situation, Trigger

STEP_BITS = 0.5
"""Budgets are whole multiples of this above the floor, or the ceiling."""

_CONFIRM_S = 1.0  # a fall must be wanted this long
_CLEAR_S = 20.0  # a rise must be possible this long; also the least time between a change and a rise
_CLEAR_MOST_S = 160.0
_STABLE_S = 600.0  # after this long without a change the time of calm is the short one again
_SETTLED_S = 5.0
_LARGE_BITS = 1.0
_HYSTERESIS = 0.08  # a rise is judged at this much more pressure
_HOLD_S = 30.0  # a sensor that falls silent counts with its last value for this long
_GRACE_S = 5.0  # sensors that have said nothing by then are reported as unknown
_SLOPE_S = 10.0  # time constant of a slope
_ABSURD = 1e6  # bounds what a broken sensor can do to a smoothed value
_UNKNOWN = "unknown"
_LONGEST_S = 60.0  # a longer gap between two steps counts as this: the machine slept, or its clock jumped


class Track(NamedTuple):
    """One signal over time.  value: smoothed; slope: per second; at_s, readings: when it was last known."""

    value: float
    slope: float
    at_s: float
    readings: Readings


@dataclass(frozen=True)
class State:
    """What the controller remembers.  Times are on its own clock, which only moves forward.

    bits: the budget; cause: the signal that last lowered it, "" if none did; notices: what this step has to say
    besides the budget; told: what has been said.
    """

    bits: float
    clock_s: float = 0.0
    now_s: float | None = None
    changed_s: float = -math.inf
    rose_s: float = -math.inf
    fall_since_s: float | None = None
    calm_since_s: float | None = None
    calm_bits: float = 0.0
    clear_s: float = _CLEAR_S
    cause: str = ""
    tracks: Mapping[str, Track] = field(default_factory=dict)
    best_tps: Mapping[float, float] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    told: frozenset[str] = frozenset()


class Decision(NamedTuple):
    """budget: average bits for the tokens to come; reason: why, in words."""

    state: State
    budget: float
    reason: str


class _Press(NamedTuple):
    pressure: float
    name: str


def start(policy: Policy) -> State:
    """The state before the first step: full quality.  policy: one that has bounds."""
    return State(bits=policy.bounds[1])


def step(state: State, readings: Readings, now: float, policy: Policy) -> Decision:
    """Decide.  Call it once or twice a second.

    now: seconds on any clock, the one of ``policy.last_until_s``; policy: one that has bounds.  A clock
    that jumps and readings that are None or not finite are survived.
    """
    low, high = policy.bounds
    elapsed_s = 0.0
    if state.now_s is not None and math.isfinite(now):
        elapsed_s = min(max(now - state.now_s, 0.0), _LONGEST_S)
    state = replace(
        state,
        clock_s=state.clock_s + elapsed_s,
        now_s=now if math.isfinite(now) else state.now_s,
        bits=min(max(state.bits, low), high),
        notices=(),
    )
    if not policy.bands:
        return Decision(replace(state, bits=high), high, "fixed")
    state = _sense(state, _finite(readings), elapsed_s, policy)
    presses = _presses(state, policy)
    before = state.bits
    state = _move(state, presses, policy)
    return Decision(state, state.bits, _reason(before, state, presses, policy))


def _finite(readings: Readings) -> Readings:
    """What is not a finite number is not known."""
    values = {f.name: getattr(readings, f.name) for f in fields(readings)}
    broken = {name: None for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)}
    return replace(readings, **broken) if broken else readings  # type: ignore[arg-type]


def _sense(state: State, readings: Readings, elapsed_s: float, policy: Policy) -> State:
    """Take in the readings: smoothed values, and a word on every sensor that is missing or has been lost."""
    sandboxed = "heat" not in state.tracks and "cpu" not in state.tracks
    # Fewer bits are never slower: a speed reached at more of them is within reach.
    best_tps = max((tps for bits, tps in state.best_tps.items() if bits >= state.bits), default=None)
    at = Situation(readings, policy, state.now_s or 0.0, state.bits, best_tps, sandboxed)
    tracks, notices, told = dict(state.tracks), [], set(state.told)
    for name in policy.bands:
        trigger, track = TRIGGERS[name], tracks.get(name)
        silent_s = state.clock_s - track.at_s if track else 0.0
        value = trigger.value(at)
        if value is not None:
            known = track if silent_s <= _HOLD_S else None
            tracks[name] = _follow(known, trigger, value, state.clock_s, elapsed_s, readings)
        elif track and not trigger.sensor:
            del tracks[name]
        elif silent_s > _HOLD_S and name not in told:
            told.add(name)
            notices.append(f"{name}: no reading for {_HOLD_S:.0f} s, it no longer counts")
    if state.clock_s >= _GRACE_S and _UNKNOWN not in told:
        told.add(_UNKNOWN)
        unknown = [name for name in policy.bands if TRIGGERS[name].sensor and name not in tracks]
        if unknown:
            notices.append(f"unknown on this board, and not counted: {', '.join(unknown)}")
    best = state.best_tps
    if readings.tokens_per_s is not None and readings.tokens_per_s > best.get(state.bits, 0.0):
        best = {**best, state.bits: readings.tokens_per_s}
    return replace(state, tracks=tracks, notices=tuple(notices), told=frozenset(told), best_tps=best)


def _follow(
    track: Track | None, trigger: Trigger, value: float, clock_s: float, elapsed_s: float, readings: Readings
) -> Track:
    value = _believable(value)
    if track is None:
        return Track(value, 0.0, clock_s, readings)
    weight = 1 - math.exp(-elapsed_s / trigger.smooth_s) if trigger.smooth_s else 1.0
    change = weight * (value - track.value)
    slope = track.slope
    if elapsed_s:
        # Two looks may be next to no time apart.
        slope += (1 - math.exp(-elapsed_s / _SLOPE_S)) * (_believable(change / elapsed_s) - slope)
    return Track(track.value + change, slope, clock_s, readings)


def _believable(value: float) -> float:
    return min(max(value, -_ABSURD), _ABSURD)


def _presses(state: State, policy: Policy) -> list[_Press]:
    """What every signal presses that is known, or was until a moment ago."""
    found = []
    for name, band in policy.bands.items():
        track, trigger = state.tracks.get(name), TRIGGERS[name]
        if track is not None and state.clock_s - track.at_s <= _HOLD_S:
            ahead = min(max(track.slope * trigger.forecast_s, 0.0), trigger.forecast_most)
            found.append(_Press(band.pressure(track.value + ahead), name))
    return found


def _target(pressure: float, low: float, high: float) -> float:
    """The budget at a pressure, on the grid."""
    if pressure <= 0:
        return high
    return low + max(math.floor((1 - pressure) * (high - low) / STEP_BITS + 1e-9), 0) * STEP_BITS


def _move(state: State, presses: list[_Press], policy: Policy) -> State:
    """Fall to what the strongest pressure wants, or rise after a time of calm."""
    low, high = policy.bounds
    now_s, bits = state.clock_s, state.bits
    since_s = now_s - state.changed_s
    wishes = [(_target(press.pressure, low, high), press.name) for press in presses]
    # A signal that has not had time to answer to the last change may hold the budget, not lower it; nor may a
    # small wish soon after a change.
    falls = [
        (target, name)
        for target, name in wishes
        if target < bits and since_s >= (TRIGGERS[name].settle_s if bits - target >= _LARGE_BITS else _CLEAR_S)
    ]
    if falls:
        wanted_s = now_s if state.fall_since_s is None else state.fall_since_s
        state = replace(state, fall_since_s=wanted_s, calm_since_s=None)
        if now_s - wanted_s < _CONFIRM_S:
            return state
        target, cause = min(falls, key=lambda fall: fall[0])
        early = now_s - state.rose_s < 2 * state.clear_s
        return replace(
            state,
            bits=target,
            cause=cause,
            changed_s=now_s,
            fall_since_s=None,
            rose_s=-math.inf,
            clear_s=min(2 * state.clear_s, _CLEAR_MOST_S) if early else state.clear_s,
        )
    state = replace(state, fall_since_s=None)
    raised = [press.pressure + _HYSTERESIS for press in presses if press.pressure > 0]
    allowed = _target(max(raised, default=0.0), low, high)
    if allowed <= bits:
        return replace(state, calm_since_s=None)
    calm_since_s = state.calm_since_s
    if calm_since_s is None:
        return replace(state, calm_since_s=now_s, calm_bits=allowed)
    # What the first seconds allow is the smoothed end of what pressed before.
    settled = now_s - calm_since_s >= _SETTLED_S
    state = replace(state, calm_bits=min(state.calm_bits, allowed) if settled else allowed)
    clear_s = _CLEAR_S if since_s > _STABLE_S else state.clear_s
    if min(now_s - calm_since_s, since_s) < clear_s:
        return state
    most = TRIGGERS[state.cause].rise_bits if state.cause else math.inf
    bits = min(state.calm_bits, bits + most)
    return replace(state, bits=bits, changed_s=now_s, rose_s=now_s, calm_since_s=None, clear_s=clear_s)


def _reason(before: float, state: State, presses: list[_Press], policy: Policy) -> str:
    """Why the budget is what it is now."""
    low, high = policy.bounds
    strongest = max(presses, key=lambda press: press.pressure, default=_Press(0.0, ""))
    name = state.cause if state.bits < before else strongest.name
    if strongest.pressure > 0 and _target(strongest.pressure, low, high) <= state.bits <= before:
        return TRIGGERS[name].describe(state.tracks[name].readings)
    cause = state.cause or "pressure"
    if state.bits > before:
        return f"{cause} eased"
    return f"{cause} eased, not for long enough yet" if state.bits < high else "nothing presses"
