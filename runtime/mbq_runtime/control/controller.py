"""The controller: a pure function from readings to the budget of the next tokens.

Each trigger of the policy gives a pressure from 0 to 1.  The highest pressure sets the budget: the policy's ceiling at
pressure 0, its floor at pressure 1.  The budget falls within seconds.  It rises after a calm time.  The calm time
doubles when the budget must fall soon after a rise.
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
"""Distance between two budgets in bits.  A budget is the floor plus a multiple of this, or the ceiling."""

_CONFIRM_S = 1.0  # the pressure must last this long before the budget falls
_CLEAR_S = 20.0  # shortest calm time before a rise, and shortest time between a change and a rise
_CLEAR_MOST_S = 160.0
_STABLE_S = 600.0  # after this long without a change the calm time is the shortest one again
_SETTLED_S = 5.0
_LARGE_BITS = 1.0
_HYSTERESIS = 0.08  # pressure that is added when a rise is considered
_HOLD_S = 30.0  # the last value of a sensor without new readings is used for this long
_GRACE_S = 5.0  # sensors without any reading by then are reported as unknown
_SLOPE_S = 10.0  # time constant of a slope
_ABSURD = 1e6  # limit for values of broken sensors, so that smoothing stays finite
_UNKNOWN = "unknown"
_LONGEST_S = 60.0  # a longer time between two steps counts as this: the machine slept, or its clock jumped


class Track(NamedTuple):
    """One signal over time.

    value: smoothed value, in the unit of the trigger; slope: change of it per second; at_s: controller time of the last
    known value; readings: the readings that gave it.
    """

    value: float
    slope: float
    at_s: float
    readings: Readings


@dataclass(frozen=True)
class State:
    """What the controller remembers.  Times are in s of its own clock, which never goes back.

    Args:
        bits: the budget, in average bits per weight.
        clock_s: the controller's own clock.
        now_s: time of the last step on the caller's clock; None before the first one.
        changed_s: time of the last change of the budget.
        rose_s: time of the last rise, if no fall came after it.
        fall_since_s: time since which a fall is wanted; None when none is.
        calm_since_s: time since which a rise is possible; None when none is.
        calm_bits: lowest budget that was possible in this calm time.
        clear_s: length of the calm time that a rise needs.
        cause: name of the trigger that last lowered the budget; "" when none did.
        tracks: the signals that are known, by trigger name.
        best_tps: best speed in tokens/s, by budget.
        best_clock: highest share of the clock that was allowed so far; None when it was never known.
        notices: messages about sensors from this step.
        told: names of the sensors about which a notice was given.
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
    best_clock: float | None = None
    notices: tuple[str, ...] = ()
    told: frozenset[str] = frozenset()


class Decision(NamedTuple):
    """Result of a step.

    state: input of the next step; budget: average bits per weight for the next tokens; reason: the cause, as text for
    people.
    """

    state: State
    budget: float
    reason: str


class _Press(NamedTuple):
    pressure: float
    name: str


def start(policy: Policy) -> State:
    """The state before the first step: the budget is the ceiling.

    Args:
        policy: a policy that has bounds.
    """
    return State(bits=policy.bounds[1])


def step(state: State, readings: Readings, now: float, policy: Policy) -> Decision:
    """Decide the budget of the next tokens.  Call it once or twice a second.

    It accepts a clock that jumps, and readings that are None or not finite.

    Args:
        state: result of ``start``, or of the last step.
        readings: what the sensors show now.
        now: seconds on any clock, the same clock as ``policy.last_until_s``.
        policy: a policy that has bounds.
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
    """The readings with None in place of values that are not finite."""
    values = {f.name: getattr(readings, f.name) for f in fields(readings)}
    broken = {name: None for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)}
    return replace(readings, **broken) if broken else readings  # type: ignore[arg-type]


def _sense(state: State, readings: Readings, elapsed_s: float, policy: Policy) -> State:
    """Add the readings to the smoothed signals.  Give a notice for each sensor that is missing or lost."""
    sandboxed = "heat" not in state.tracks and "cpu" not in state.tracks
    # Fewer bits are never slower, so a speed that was reached at more bits is possible here too.
    best_tps = max((tps for bits, tps in state.best_tps.items() if bits >= state.bits), default=None)
    clock = max(filter(None, (state.best_clock, readings.cpu_freq_fraction)), default=None)
    at = Situation(readings, policy, state.now_s or 0.0, state.bits, best_tps, clock, sandboxed)
    tracks, notices, told = dict(state.tracks), [], set(state.told)
    for name in policy.bands:
        trigger, track = TRIGGERS[name], tracks.get(name)
        silent_s = state.clock_s - track.at_s if track else 0.0
        value = trigger.value(at)
        if value is not None:
            known = track if silent_s <= _HOLD_S else None
            tracks[name] = _smoothed(known, trigger, value, state.clock_s, elapsed_s, readings)
        elif track and not trigger.sensor:
            del tracks[name]
        elif silent_s > _HOLD_S and name not in told:
            told.add(name)
            notices.append(f"{name}: no reading for {_HOLD_S:.0f} s; it is ignored")
    if state.clock_s >= _GRACE_S and _UNKNOWN not in told:
        told.add(_UNKNOWN)
        unknown = [name for name in policy.bands if TRIGGERS[name].sensor and name not in tracks]
        if unknown:
            notices.append(f"unknown on this board, and ignored: {', '.join(unknown)}")
    best = state.best_tps
    if readings.tokens_per_s is not None and readings.tokens_per_s > best.get(state.bits, 0.0):
        best = {**best, state.bits: readings.tokens_per_s}
    state = replace(state, best_tps=best, best_clock=clock)
    return replace(state, tracks=tracks, notices=tuple(notices), told=frozenset(told))


def _smoothed(
    track: Track | None, trigger: Trigger, value: float, clock_s: float, elapsed_s: float, readings: Readings
) -> Track:
    value = _believable(value)
    if track is None:
        return Track(value, 0.0, clock_s, readings)
    weight = 1 - math.exp(-elapsed_s / trigger.smooth_s) if trigger.smooth_s else 1.0
    change = weight * (value - track.value)
    slope = track.slope
    if elapsed_s:
        # The time between two steps can be almost 0.
        slope += (1 - math.exp(-elapsed_s / _SLOPE_S)) * (_believable(change / elapsed_s) - slope)
    return Track(track.value + change, slope, clock_s, readings)


def _believable(value: float) -> float:
    return min(max(value, -_ABSURD), _ABSURD)


def _presses(state: State, policy: Policy) -> list[_Press]:
    """The pressure of each signal that has a value of the last ``_HOLD_S`` seconds."""
    found = []
    for name, band in policy.bands.items():
        track, trigger = state.tracks.get(name), TRIGGERS[name]
        if track is not None and state.clock_s - track.at_s <= _HOLD_S:
            ahead = min(max(track.slope * trigger.forecast_s, 0.0), trigger.forecast_most)
            found.append(_Press(band.pressure(track.value + ahead), name))
    return found


def _target(pressure: float, low: float, high: float) -> float:
    """The budget at a pressure: the floor plus a multiple of ``STEP_BITS``, or the ceiling."""
    if pressure <= 0:
        return high
    return low + max(math.floor((1 - pressure) * (high - low) / STEP_BITS + 1e-9), 0) * STEP_BITS


def _move(state: State, presses: list[_Press], policy: Policy) -> State:
    """Lower the budget to what the highest pressure needs, or raise it after a calm time."""
    low, high = policy.bounds
    now_s, bits = state.clock_s, state.bits
    since_s = now_s - state.changed_s
    wishes = [(_target(press.pressure, low, high), press.name) for press in presses]
    # Some signals answer to a change only after a time.  Until then they can stop a rise, but cannot cause a fall.
    # A small fall soon after a change is not allowed either.
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
    # In the first seconds the smoothed signals still show the pressure from before.
    settled = now_s - calm_since_s >= _SETTLED_S
    state = replace(state, calm_bits=min(state.calm_bits, allowed) if settled else allowed)
    clear_s = _CLEAR_S if since_s > _STABLE_S else state.clear_s
    if min(now_s - calm_since_s, since_s) < clear_s:
        return state
    most = TRIGGERS[state.cause].rise_bits if state.cause else math.inf
    bits = min(state.calm_bits, bits + most)
    return replace(state, bits=bits, changed_s=now_s, rose_s=now_s, calm_since_s=None, clear_s=clear_s)


def _reason(before: float, state: State, presses: list[_Press], policy: Policy) -> str:
    """The reason for the budget, as text for people."""
    low, high = policy.bounds
    strongest = max(presses, key=lambda press: press.pressure, default=_Press(0.0, ""))
    name = state.cause if state.bits < before else strongest.name
    if strongest.pressure > 0 and _target(strongest.pressure, low, high) <= state.bits <= before:
        return TRIGGERS[name].describe(state.tracks[name].readings)
    cause = state.cause or "pressure"
    if state.bits > before:
        return f"{cause} decreased"
    return f"{cause} decreased; the budget rises after a calm time" if state.bits < high else "no pressure"
