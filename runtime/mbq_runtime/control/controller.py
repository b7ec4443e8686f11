"""The controller: a pure function from readings to the budget of the next tokens.

Each trigger of the policy gives a wish: the highest budget that is enough for it.  A trigger computes it from what the
controller learned about the board (its need).  Before anything is learned, the trigger's band gives a pressure from 0
to 1: the policy's ceiling at pressure 0, its floor at pressure 1.  The lowest wish sets the budget.

The budget falls when a wish lasts.  It rises in steps that every trigger allows for some time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

from mbq_runtime.sensing.readings import Readings

from .learned import Learned
from .policy import Policy
from .tracks import HOLD_S, Track, sense
from .triggers import DRIVE_W, TRIGGERS, Situation
from .wishes import Wish, describe, wishes

_CLEAR_S = 20.0  # shortest calm time before a rise without a model, and shortest time between a change and a rise
_CLEAR_MOST_S = 160.0
_SAFE_S = 5.0  # calm time before a rise that the model knows to be safe
_APART_S = 10.0  # shortest time between a change and such a rise, or a small fall
_STABLE_S = 600.0  # after this long without a change the calm time is the shortest one again
_SETTLED_S = 2.0
_LARGE_BITS = 1.0
_LAPSE_S = 1.1  # a wish that pauses for this long still lasts
_PACE_S = 0.5  # time constant of the smoothed time of a token
_USAGE_S = 20.0  # time constant of the smoothed share of the time that is spent on tokens
_TEMP_S = 10.0  # time constant of the smoothed temperature
_LONGEST_S = 60.0  # a longer time between two steps counts as this: the machine slept, or its clock jumped


@dataclass(frozen=True)
class State:
    """What the controller remembers.  Times are in s of its own clock, which never goes back.

    Args:
        bits: the budget, in average bits per weight.
        clock_s: the controller's own clock.
        now_s: time of the last step on the caller's clock; None before the first one.
        changed_s: time of the last change of the budget.
        rose_s: time of the last rise, if no fall came after it.
        wanted: by trigger, (time since which it wants a fall, time at which it last did).
        calm_since_s: time since which a rise is possible; None when none is.
        calm_bits: lowest budget that was possible in this calm time.
        clear_s: length of the calm time that a rise needs without a model.
        cause: name of the trigger that last lowered the budget; "" when none did.
        tracks: the signals that are known, by trigger name.
        best_tps: best speed in tokens/s, by budget.
        best_clock: highest share of the clock that was allowed so far; None when it was never known.
        pace_s: smoothed time of a token at the highest budget of the bundle, in s; None when none is known.
        paced: (controller time in s, number of threads) of the last tokens in ``pace_s``.
        usage: smoothed (share of the time that is spent on tokens, tokens/s with pauses); None when it is unknown.
        temp_c: smoothed temperature in C; None when it is unknown.
        learned: what is known about the board.
        notices: messages about sensors from this step.
        told: names of the sensors about which a notice was given.
    """

    bits: float
    clock_s: float = 0.0
    now_s: float | None = None
    changed_s: float = -math.inf
    rose_s: float = -math.inf
    wanted: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    calm_since_s: float | None = None
    calm_bits: float = 0.0
    clear_s: float = _CLEAR_S
    cause: str = ""
    tracks: Mapping[str, Track] = field(default_factory=dict)
    best_tps: Mapping[float, float] = field(default_factory=dict)
    best_clock: float | None = None
    pace_s: float | None = None
    paced: tuple[float, int] = (0.0, 1)
    usage: tuple[float, float] | None = None
    temp_c: float | None = None
    learned: Learned = field(default_factory=Learned)
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


def start(policy: Policy, learned: Learned | None = None) -> State:
    """The state before the first step: the budget is the ceiling.

    Args:
        policy: a policy that has bounds.
        learned: what is known about the board; None: nothing.
    """
    return State(bits=policy.bounds[1], learned=learned or Learned())


def step(state: State, readings: Readings, now: float, policy: Policy, *, learns_speed: bool = True) -> Decision:
    """Decide the budget of the next tokens.  Call it once or twice a second.

    It accepts a clock that jumps, and readings that are None or not finite.

    Args:
        state: result of ``start``, or of the last step.
        readings: what the sensors show now.
        now: seconds on any clock, the same clock as ``policy.last_until_s``.
        policy: a policy that has bounds.
        learns_speed: whether the speed of the last tokens tells the speed of the board.
    """
    low, high = policy.bounds
    spent_s = elapsed_s(state, now)
    state = replace(
        state,
        clock_s=state.clock_s + spent_s,
        now_s=now if math.isfinite(now) else state.now_s,
        bits=min(max(state.bits, low), high),
        notices=(),
    )
    if not policy.bands:
        return Decision(replace(state, bits=high), high, "fixed")
    readings = _finite(readings)
    state = _used(_paced(state, readings, spent_s, policy), readings, spent_s)
    at = situation(state, readings, policy)
    seen = sense(state.tracks, state.told, at, state.clock_s, spent_s)
    state = replace(state, tracks=seen.tracks, notices=seen.notices, told=seen.told)
    found = wishes(state.tracks, at, state.clock_s)
    before = state.bits
    state = _move(state, found, spent_s, policy)
    reason = _reason(before, state, found, at)
    return Decision(_learn(state, found, at, spent_s, learns_speed), state.bits, reason)


def elapsed_s(state: State, now: float) -> float:
    """Time in s since the last step: never below 0, and at most a minute after a jump of the clock.

    Args:
        state: result of the last step.
        now: seconds on the caller's clock.
    """
    if state.now_s is None or not math.isfinite(now):
        return 0.0
    return min(max(now - state.now_s, 0.0), _LONGEST_S)


def _finite(readings: Readings) -> Readings:
    """The readings with None in place of values that are not finite."""
    values = {f.name: getattr(readings, f.name) for f in fields(readings)}
    broken = {name: None for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)}
    return replace(readings, **broken) if broken else readings  # type: ignore[arg-type]


def _paced(state: State, readings: Readings, elapsed_s: float, policy: Policy) -> State:
    """Add the last tokens to the smoothed time of a token."""
    threads = readings.decode_threads or policy.threads or 1
    tps = readings.tokens_per_s
    if tps is None or not 1e-3 < tps < 1e6:
        return state if state.clock_s - state.paced[0] <= HOLD_S else replace(state, pace_s=None)
    part = policy.part(readings.decode_bits or state.bits)
    now_s = 1 / tps / state.learned.token_time(threads).shape(part)
    if state.pace_s is not None and threads == state.paced[1]:
        now_s = state.pace_s + (1 - math.exp(-elapsed_s / _PACE_S)) * (now_s - state.pace_s)
    return replace(state, pace_s=now_s, paced=(state.clock_s, threads))


def _used(state: State, readings: Readings, elapsed_s: float) -> State:
    """Add the last readings to the smoothed usage and temperature."""
    temp_c, before_c = readings.temp_c, state.temp_c
    if temp_c is not None and before_c is not None:
        temp_c = before_c + (1 - math.exp(-elapsed_s / _TEMP_S)) * (min(max(temp_c, -1e3), 1e3) - before_c)
    state = replace(state, temp_c=temp_c)
    share = readings.decode_share
    if share is None or not 0 <= share <= 1:
        return state
    now = (share, min(share * (readings.tokens_per_s or 0.0), 1e6))
    if state.usage is not None:
        weight = 1 - math.exp(-elapsed_s / _USAGE_S)
        now = (state.usage[0] + weight * (now[0] - state.usage[0]), state.usage[1] + weight * (now[1] - state.usage[1]))
    return replace(state, usage=now)


def situation(state: State, readings: Readings, policy: Policy) -> Situation:
    """What triggers can use to compute their values.

    Args:
        state: what the controller remembers.
        readings: what the sensors show now.
        policy: a policy that has bounds.
    """
    # Fewer bits are never slower, so a speed that was reached at more bits is possible here too.
    best_tps = max((tps for bits, tps in state.best_tps.items() if bits >= state.bits), default=None)
    clock = max(filter(None, (state.best_clock, readings.cpu_freq_fraction)), default=None)
    return Situation(
        readings, policy, state.now_s or 0.0, state.bits,
        best_tps=best_tps, best_clock=clock, sandboxed="heat" not in state.tracks and "cpu" not in state.tracks,
        pace_s=state.pace_s, threads=state.paced[1], usage=state.usage, temp_c=state.temp_c, learned=state.learned,
    )  # fmt: skip


def _learn(state: State, found: list[Wish], at: Situation, elapsed_s: float, learns_speed: bool) -> State:
    """Add the readings to what is known."""
    readings, best, learned = at.readings, state.best_tps, state.learned
    state = replace(state, best_clock=at.best_clock)
    tps, share = readings.tokens_per_s, readings.decode_share
    if learns_speed and tps is not None and tps > best.get(state.bits, 0.0):
        state = replace(state, best_tps={**best, state.bits: tps})
    if elapsed_s == 0:
        return state
    bits = readings.decode_bits or at.bits
    # The time and the power of a token are those of the board alone only if nothing slowed it.
    quiet = learns_speed and any(wish.name == "cpu" for wish in found) and not any(wish.slows for wish in found)
    if quiet and tps is not None and tps > 0:
        learned = learned.with_token(at.threads, at.policy.part(bits), 1 / tps, min(elapsed_s, 1.0))
    if share is not None and 0 <= share <= 1:
        gb_s = min(share * (tps or 0.0), 1e6) * at.policy.bytes_of(bits) * 1e-9
        watts = learned.watts
        if quiet and readings.power_w is not None:
            watts = watts.after(readings.power_w, share, gb_s, min(elapsed_s, 1.0))
        drive = share if readings.power_w is None else readings.power_w / DRIVE_W
        heat = learned.heat
        if readings.temp_c is not None:
            heat = heat.after(readings.temp_c, drive, elapsed_s)
        learned = replace(learned, watts=watts, heat=heat)
    return replace(state, learned=learned)


def _move(state: State, found: list[Wish], elapsed_s: float, policy: Policy) -> State:
    """Lower the budget to the lowest wish, or raise it after a calm time."""
    now_s, bits = state.clock_s, state.bits
    since_s = now_s - state.changed_s
    # Some signals answer to a change only after a time.  Until then they can stop a rise, but cannot cause a fall.
    # A small fall soon after a change is not allowed either.
    falls = [
        wish
        for wish in found
        if wish.target < bits and since_s >= (wish.settle_s if bits - wish.target >= _LARGE_BITS else wish.apart_s)
    ]
    lapse_s = max(_LAPSE_S, elapsed_s)
    lasting = {name: times for name, times in state.wanted.items() if now_s - times[1] <= lapse_s}
    wanted = lasting | {wish.name: (lasting.get(wish.name, (now_s, now_s))[0], now_s) for wish in falls}
    state = replace(state, wanted=wanted)
    ready = [wish for wish in falls if now_s - wanted[wish.name][0] >= wish.confirm_s]
    if ready:
        lowest = min(ready, key=lambda wish: wish.target)
        early = now_s - state.rose_s < 2 * state.clear_s and not lowest.known
        return replace(
            state,
            bits=lowest.target,
            cause=lowest.name,
            changed_s=now_s,
            wanted={},
            rose_s=-math.inf,
            calm_since_s=None,
            clear_s=min(2 * state.clear_s, _CLEAR_MOST_S) if early else state.clear_s,
        )
    allowed = min((wish.allowed for wish in found), default=policy.bounds[1])
    if falls or allowed <= bits:
        return replace(state, calm_since_s=None)
    calm_since_s = state.calm_since_s
    if calm_since_s is None:
        return replace(state, calm_since_s=now_s, calm_bits=allowed)
    # In the first seconds the smoothed signals still show the pressure from before.
    settled = now_s - calm_since_s >= _SETTLED_S
    state = replace(state, calm_bits=min(state.calm_bits, allowed) if settled else allowed)
    cause = next((wish for wish in found if wish.name == state.cause), None)
    known = cause is not None and cause.known
    clear_s = _CLEAR_S if since_s > _STABLE_S else state.clear_s
    if now_s - calm_since_s < (_SAFE_S if known else clear_s) or since_s < (_APART_S if known else clear_s):
        return state
    most = TRIGGERS[state.cause].rise_bits if state.cause and not known else math.inf
    bits = min(state.calm_bits, bits + most)
    return replace(state, bits=bits, changed_s=now_s, rose_s=now_s, calm_since_s=None, clear_s=clear_s)


def _reason(before: float, state: State, found: list[Wish], at: Situation) -> str:
    """The reason for the budget, as text for people."""
    lowest = min(found, key=lambda wish: wish.target, default=None)
    if lowest is not None and lowest.target < at.policy.bounds[1] and lowest.target <= state.bits <= before:
        fell = state.bits < before
        wish = next(wish for wish in found if wish.name == state.cause) if fell else lowest
        return describe(wish, state.tracks[wish.name].readings, at, state.bits)
    cause = state.cause or "pressure"
    if state.bits > before:
        return f"{cause} decreased"
    return (
        f"{cause} decreased; the budget rises after a calm time" if state.bits < at.policy.bounds[1] else "no pressure"
    )
