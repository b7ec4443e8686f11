"""The triggers: one row for each cause that can lower the budget.  A higher value of a trigger is worse."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mbq_runtime.sensing.readings import Readings

from .learned import Learned
from .policy import Policy


@dataclass(frozen=True)
class Situation:
    """What a trigger can use to compute its value.

    Args:
        readings: what the sensors show now.
        policy: the policy in force, with bounds.
        now_s: time in s, on the clock of ``policy.last_until_s``.
        bits: the budget now, in average bits per weight.
        best_tps: best speed so far at this budget or a higher one, in tokens/s; None when there is none.
        best_clock: highest share of the clock that was allowed so far; None when it was never known.
        sandboxed: whether neither the heat nor the load of this board was ever known.
        pace_s: smoothed time that a token would take now at the highest budget of the bundle, in s; None is unknown.
        threads: number of threads that the engine uses.
        usage: smoothed (share of the time that is spent on tokens, tokens/s with pauses); None is unknown.
        temp_c: smoothed temperature in C; None is unknown.
        learned: what is known about the board.
    """

    readings: Readings
    policy: Policy
    now_s: float
    bits: float
    best_tps: float | None
    best_clock: float | None = None
    sandboxed: bool = False
    pace_s: float | None = None
    threads: int = 1
    usage: tuple[float, float] | None = None
    temp_c: float | None = None
    learned: Learned = field(default_factory=Learned)

    def pressure_at(self, bits: float) -> float:
        """The pressure, from 0 to 1, that gives a budget.

        Args:
            bits: the budget, in average bits per weight.
        """
        low, high = self.policy.bounds
        return min(max((high - bits) / (high - low), 0.0), 1.0) if high > low else 0.0

    @property
    def goal_tps(self) -> float | None:
        """The speed to hold in tokens/s: that of the policy, or a share of the speed without pressure.  None is
        unknown."""
        if self.policy.min_tps is not None:
            return self.policy.min_tps
        line = self.learned.token_time(self.policy.threads or 1)
        return self.policy.kept_speed / line.at(self.policy.part(self.policy.bounds[1])) if line.is_known else None

    def token_s(self, bits: float) -> float | None:
        """Time of a token in s that is expected at a budget, if everything else stays as it is.  None is unknown.

        Args:
            bits: the budget, in average bits per weight.
        """
        if self.pace_s is None:
            return None
        return self.pace_s * self.learned.token_time(self.threads).shape(self.policy.part(bits))

    def usage_at(self, bits: float) -> tuple[float, float] | None:
        """(share of the time, tokens/s) that are expected at a budget, if the tokens that are asked for stay the same.

        An engine that decodes without pause does so at every budget.  None is unknown.

        Args:
            bits: the budget, in average bits per weight.
        """
        token_s = self.token_s(bits)
        if self.usage is None or token_s is None:
            return self.usage
        share, tps = self.usage
        return (share, share / token_s) if share > _WITHOUT_PAUSE else (min(tps * token_s, 1.0), tps)

    def power_at(self, bits: float) -> float | None:
        """Power in W that is expected at a budget.  None is unknown.

        Args:
            bits: the budget, in average bits per weight.
        """
        usage = self.usage_at(bits)
        if usage is None or self.readings.power_w is None or not self.learned.watts.is_known:
            return None
        return self.learned.watts.at(usage[0], usage[1] * self.policy.bytes_of(bits) * 1e-9)

    def drive_at(self, bits: float) -> float | None:
        """What heats the board at a budget: the power in 10 W, or else the share of the time in which it decodes.

        Args:
            bits: the budget, in average bits per weight.
        """
        if self.readings.power_w is not None:
            power_w = self.power_at(bits)
            return None if power_w is None else power_w / DRIVE_W
        usage = self.usage_at(bits)
        return None if usage is None else usage[0]


DRIVE_W = 10.0
"""Power in W that drives the heat of a board as much as cores that decode without pause."""
_WITHOUT_PAUSE = 0.95  # share of the time


@dataclass(frozen=True)
class Trigger:
    """One cause that can lower the budget.

    Args:
        value: computes the value; None is unknown.
        describe: makes the reason, as text for people.
        smooth_s: time constant of the smoothing, in s; 0: no smoothing.
        forecast_s: the slope is extended this far into the future, in s.
        forecast_most: largest change by the forecast, in the unit of the value.
        settle_s: time in s after a change of the budget before this trigger can lower it again.  A signal that the
            budget itself moves needs this time to answer.
        rise_bits: largest rise, in bits, after this trigger lowered the budget.
        sensor: whether a notice is given when the value is missing.
        need: computes from what is known about the board the highest of some budgets that is enough, with some
            ``room``; None is unknown, and the policy's band counts.
        describe_need: makes the reason of a need, without the budget.
        gate: the need counts while the value is above this.
        room: room that a rise needs: a share, or C for heat.
        confirm_s: how long a need must last before the budget falls, in s.
        slows: whether nothing can be learned about the speed of the board while the value is above ``gate``.
    """

    value: Callable[[Situation], float | None]
    describe: Callable[[Readings], str]
    smooth_s: float = 0.0
    forecast_s: float = 0.0
    forecast_most: float = 0.0
    settle_s: float = 2.0
    rise_bits: float = math.inf
    sensor: bool = True
    need: Callable[[Situation, Sequence[float], float], float | None] | None = None
    describe_need: Callable[[Situation, Readings], str] | None = None
    gate: float = 0.0
    room: float = 0.03
    confirm_s: float = 1.0
    slows: bool = False


_BEFORE_OFF_C = 10.0  # without another limit, the limit is this far below the temperature of switching off


def _limit_c(r: Readings) -> float | None:
    if r.throttle_temp_c is not None or r.critical_temp_c is None:
        return r.throttle_temp_c
    return r.critical_temp_c - _BEFORE_OFF_C


def _heat(at: Situation) -> float | None:
    temp_c, limit_c = at.readings.temp_c, _limit_c(at.readings)
    return None if temp_c is None or limit_c is None else temp_c - limit_c


def _throttle(at: Situation) -> float | None:
    return None if at.readings.heat_throttled is None else float(at.readings.heat_throttled)


def _supply(at: Situation) -> float | None:
    return None if at.readings.undervoltage is None else float(at.readings.undervoltage)


_WARM_C = 80.0  # a board whose limit is unknown does not slow itself below this temperature
_NEAR_LIMIT_C = 5.0


def _clock(at: Situation) -> float | None:
    """The share of the clock that heat takes away.  It is used only where heat throttling is unknown.

    The limit of the clock can also be the user's own setting.  A setting does not depend on the temperature, so the
    limit of a cool board does not count.  Without a temperature only a limit that fell counts.
    """
    r = at.readings
    if r.heat_throttled is not None:
        return 0.0
    if r.cpu_freq_fraction is None:
        return None
    if r.temp_c is None:
        return 1 - r.cpu_freq_fraction / max(at.best_clock or 0.0, r.cpu_freq_fraction, 1e-3)
    limit_c = _limit_c(r)
    warm_c = _WARM_C if limit_c is None else limit_c - _NEAR_LIMIT_C
    return 0.0 if r.temp_c < warm_c else 1 - r.cpu_freq_fraction


def _battery(at: Situation) -> float | None:
    r = at.readings
    if r.discharging is False:
        return -1.0
    return None if r.discharging is None or r.battery_fraction is None else 1 - r.battery_fraction


def _foreign(r: Readings) -> float | None:
    return r.cpu_pressure if r.foreign_cpu_fraction is None else r.foreign_cpu_fraction


def _cpu(at: Situation) -> float | None:
    return _foreign(at.readings)


def _quota(at: Situation) -> float | None:
    """The higher of two shares: periods in which the limit stops us, and threads for which it leaves no time.

    The second one stays when the engine uses fewer threads and is no longer stopped.
    """
    available, threads = at.readings.available_cpus, at.policy.threads
    withheld = 0.0 if available is None or threads is None else 1 - available / threads
    stopped = at.readings.cgroup_throttled_fraction
    if stopped is None:
        return withheld if withheld > 0 else None
    return max(stopped, withheld)


def _memory(at: Situation) -> float | None:
    """The pressure that gives the highest budget whose weights fit in the available memory."""
    available = at.readings.available_memory_bytes
    if available is None or not at.policy.bytes_at:
        return None
    low, _ = at.policy.bounds
    fitting = [bits for bits, size in at.policy.bytes_at if size <= available]
    return at.pressure_at(max(fitting, default=low))


def _latency(at: Situation) -> float | None:
    """The share of the speed goal that is missing."""
    goal, tps = at.policy.min_tps, at.readings.tokens_per_s
    return None if goal is None or tps is None else 1 - tps / goal


_NEAR = 0.01  # a speed that is this near to its goal holds it


def _hold_speed(at: Situation, budgets: Sequence[float], room: float) -> float | None:
    """The highest budget at which the speed stays at the goal; the lowest one if none is fast enough."""
    goal = at.goal_tps
    if goal is None:
        return None
    if at.pace_s is None:  # no tokens come, so no speed is missing
        return budgets[0]
    most_s = (1 + _NEAR) / (goal * (1 + room))
    fast = (bits for bits in budgets if (expected_s := at.token_s(bits)) is not None and expected_s <= most_s)
    return next(fast, budgets[-1])


_AHEAD_S, _AHEAD = 40.0, 0.25  # the temperature must stay below the limit for this long, and this part of tau
_COOLS_C = 2.0  # a budget that cools the board by less than this in the end does not cool it
_SAVES = 0.02  # a budget that saves a smaller share of the power saves none


def _stay_cool(at: Situation, budgets: Sequence[float], room: float) -> float | None:
    """The highest budget at which the forecast stays below the limit minus the policy's margin.

    The margin is the middle of the band.  Without pauses fewer bits do not cool a board, and none are given.
    """
    heat, temp_c, limit_c = at.learned.heat, at.temp_c, _limit_c(at.readings)
    most, least = at.drive_at(budgets[0]), at.drive_at(budgets[-1])
    if temp_c is None or limit_c is None or most is None or least is None or not heat.is_known:
        return None
    if heat.settled_c(most) - heat.settled_c(least) < _COOLS_C:
        return budgets[0]
    highest_c = limit_c + math.fsum(at.policy.bands["heat"]) / 2 - room
    ahead_s = max(_AHEAD_S, _AHEAD * heat.tau_s)
    drives = ((bits, at.drive_at(bits)) for bits in budgets)
    cool = (b for b, drive in drives if drive is not None and heat.forecast_c(temp_c, drive, ahead_s) <= highest_c)
    return next(cool, budgets[-1])


def is_too_warm(at: Situation, room_c: float) -> bool:
    """Whether decoding without pause at the policy's ceiling would take the board to the temperature to stay below.

    Before the heat of the board is known, it is too warm from the start of the band.

    Args:
        at: what is known now.
        room_c: room below that temperature, in C.
    """
    heat, temp_c, limit_c = at.learned.heat, at.temp_c, _limit_c(at.readings)
    band = at.policy.bands.get("heat")
    if temp_c is None or limit_c is None or band is None:
        return bool(at.readings.heat_throttled)
    drive = 1.0
    if at.readings.power_w is not None:
        token_s = at.token_s(at.policy.bounds[1])
        rate = 0.0 if token_s is None else at.policy.bytes_of(at.policy.bounds[1]) * 1e-9 / token_s
        drive = at.learned.watts.at(1.0, rate) / DRIVE_W
    if not heat.is_known or not (at.readings.power_w is None or at.learned.watts.is_known):
        return temp_c > limit_c + band.start - room_c
    ahead_s = max(_AHEAD_S, _AHEAD * heat.tau_s)
    return heat.forecast_c(temp_c, drive, ahead_s) > limit_c + math.fsum(band) / 2 - room_c


def _describe_stay_cool(at: Situation, r: Readings) -> str:
    limit_c = _limit_c(r)
    most_c = None if limit_c is None else limit_c + math.fsum(at.policy.bands["heat"]) / 2
    return f"stays below {_text(most_c, '.1f')} C, {_text(r.temp_c, '.1f')} C now"


def _last(at: Situation, budgets: Sequence[float], room: float) -> float | None:
    """The highest budget at which the energy left is enough for the tokens that are expected until the goal."""
    r, until_s = at.readings, at.policy.last_until_s
    most_w, least_w = at.power_at(budgets[0]), at.power_at(budgets[-1])
    if until_s is None or r.battery_energy_wh is None or most_w is None or least_w is None:
        return None
    if not r.discharging or until_s <= at.now_s or least_w > (1 - _SAVES) * most_w:
        return budgets[0]
    allowed_w = 3600 * r.battery_energy_wh / (until_s - at.now_s) * (1 - room)
    powers = ((bits, at.power_at(bits)) for bits in budgets)
    return next((b for b, power_w in powers if power_w is not None and power_w <= allowed_w), budgets[-1])


def _describe_last(at: Situation, r: Readings) -> str:
    left_h = max((at.policy.last_until_s or 0.0) - at.now_s, 0.0) / 3600
    return f"{_text(r.battery_energy_wh, '.1f')} Wh last {left_h:.1f} h"


def _lifetime(at: Situation) -> float | None:
    """The pressure that changes the budget by the excess of power over what the battery allows until the goal."""
    r, until_s = at.readings, at.policy.last_until_s
    if until_s is None or r.discharging is None:
        return None
    if not r.discharging or until_s <= at.now_s:
        return 0.0
    if r.battery_energy_wh is None or not r.power_w:
        return None
    allowed_w = 3600 * r.battery_energy_wh / (until_s - at.now_s)
    missing = r.power_w / max(allowed_w, 1e-3) - 1
    if -0.1 <= missing <= 0:
        return at.pressure_at(at.bits)
    return min(max(at.pressure_at(at.bits) + missing, 0.0), 1.0)


def _device(at: Situation) -> float | None:
    return None if at.readings.device_state is None else float(at.readings.device_state)


def _saver(at: Situation) -> float | None:
    return None if at.readings.saving is None else float(at.readings.saving)


def _hidden(at: Situation) -> float | None:
    return None if at.readings.hidden is None else float(at.readings.hidden)


def _pace(at: Situation) -> float | None:
    """The share of its best speed that the model lost.  It is used only where heat and load are unknown."""
    tps = at.readings.tokens_per_s
    if not at.sandboxed or tps is None or at.best_tps is None:
        return None
    return 1 - tps / at.best_tps


def _text(value: float | None, form: str) -> str:
    return "?" if value is None else format(value, form)


def _describe_heat(r: Readings) -> str:
    return f"heat: {_text(r.temp_c, '.1f')} C, the limit is {_text(_limit_c(r), '.0f')} C"


def _describe_cpu(r: Readings) -> str:
    if r.foreign_cpu_fraction is None:
        return f"cpu: programs wait for a processor {_text(r.cpu_pressure, '.0%')} of the time"
    return f"cpu: other programs use {_text(r.foreign_cpu_fraction, '.0%')}"


def _describe_quota(r: Readings) -> str:
    stops = f"it stops this program in {_text(r.cgroup_throttled_fraction, '.0%')} of its periods"
    return f"quota: the cgroup limit is {_text(r.available_cpus, '.1f')} processors, {stops}"


DEVICE_STATES = ("nominal", "fair", "serious", "critical")
"""Words of a browser for how hard the device is pressed."""


def _describe_device(r: Readings) -> str:
    state = r.device_state
    known = state is not None and 0 <= state < len(DEVICE_STATES)
    return f"device: its state is {DEVICE_STATES[int(state)] if known and state is not None else '?'}"


def _describe_lifetime(r: Readings) -> str:
    return f"lifetime: {_text(r.power_w, '.1f')} W is too much for {_text(r.battery_energy_wh, '.1f')} Wh to last"


def _beside(what: Callable[[Readings], str]) -> Callable[[Situation, Readings], str]:
    """The reason of a speed that is held.  what: names what slows the board."""

    def describe(at: Situation, r: Readings) -> str:
        goal, expected_s = at.goal_tps or math.nan, at.token_s(at.policy.bounds[0])
        if expected_s is not None and expected_s * goal > 1:
            return f"{1 / expected_s:.1f} of {goal:.1f} tokens/s {what(r)}".rstrip()
        return f"holds {goal:.1f} tokens/s {what(r)}".rstrip()

    return describe


def _load(r: Readings) -> str:
    return f"beside a load of {_text(_foreign(r), '.0%')}"


def _limit(r: Readings) -> str:
    return f"within a limit of {_text(r.available_cpus, '.1f')} processors"


_SPIKE_S = 2.2  # a load that is shorter costs no quality
_SEEN = 0.06  # share of time that other programs use on an idle machine, and that the clocks cannot tell from nothing

TRIGGERS: dict[str, Trigger] = {
    "heat": Trigger(
        _heat,
        _describe_heat,
        smooth_s=5,
        forecast_s=20,
        forecast_most=3,
        settle_s=20,
        rise_bits=1,
        need=_stay_cool,
        describe_need=_describe_stay_cool,
        gate=-math.inf,
        room=0.2,
    ),
    "throttle": Trigger(
        _throttle,
        lambda r: "throttle: heat slows the board now",
        rise_bits=1,
        need=_hold_speed,
        describe_need=_beside(lambda r: "while heat slows the board"),
        slows=True,
    ),
    "supply": Trigger(
        _supply,
        lambda r: "supply: under-voltage slows the board now",
        rise_bits=1,
        need=_hold_speed,
        describe_need=_beside(lambda r: "while under-voltage slows the board"),
        slows=True,
    ),
    "clock": Trigger(
        _clock,
        lambda r: f"clock: limited to {_text(r.cpu_freq_fraction, '.0%')}",
        smooth_s=5,
        rise_bits=1,
        need=_hold_speed,
        describe_need=_beside(lambda r: f"at a clock of {_text(r.cpu_freq_fraction, '.0%')}"),
        gate=_SEEN,
        slows=True,
    ),
    "battery": Trigger(_battery, lambda r: f"battery: {_text(r.battery_fraction, '.0%')} left", settle_s=20),
    "cpu": Trigger(
        _cpu,
        _describe_cpu,
        smooth_s=1.2,
        need=_hold_speed,
        describe_need=_beside(_load),
        gate=_SEEN,
        confirm_s=_SPIKE_S,
        slows=True,
    ),
    "quota": Trigger(
        _quota,
        _describe_quota,
        smooth_s=1.2,
        need=_hold_speed,
        describe_need=_beside(_limit),
        gate=_SEEN,
        confirm_s=_SPIKE_S,
        slows=True,
    ),
    "memory": Trigger(_memory, lambda r: f"memory: {_text(r.available_memory_bytes, ',')} bytes available"),
    # What browsers tell, in place of the sensors of a board.
    "device": Trigger(_device, _describe_device, settle_s=20, rise_bits=1, sensor=False),
    "saver": Trigger(_saver, lambda r: "saver: the user asks to save data", sensor=False),
    "hidden": Trigger(_hidden, lambda r: "hidden: nobody sees the page", sensor=False),
    "pace": Trigger(
        _pace,
        lambda r: f"pace: the speed fell to {_text(r.tokens_per_s, '.1f')} tokens/s",
        smooth_s=5,
        settle_s=20,
        rise_bits=1,
        sensor=False,
    ),
    "latency": Trigger(
        _latency,
        lambda r: f"latency: {_text(r.tokens_per_s, '.1f')} tokens/s",
        settle_s=3,
        sensor=False,
        need=_hold_speed,
        describe_need=_beside(lambda _: ""),
        gate=-math.inf,
    ),
    "lifetime": Trigger(
        _lifetime,
        _describe_lifetime,
        smooth_s=20,
        settle_s=60,
        rise_bits=0.5,
        sensor=False,
        need=_last,
        describe_need=_describe_last,
        room=0.02,
        gate=-math.inf,
    ),
}
"""The triggers by name.  A policy has a ``Band`` for each trigger that it uses."""
