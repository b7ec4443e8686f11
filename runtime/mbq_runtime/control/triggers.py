"""The signals a budget listens to: one row each, from readings to a value that is worse when higher."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from mbq_runtime.sensing.readings import Readings

from .policy import Policy


@dataclass(frozen=True)
class Situation:
    """What a signal is judged by.  bits: the budget now; best_tps: the best speed seen at it, if any."""

    readings: Readings
    policy: Policy
    now_s: float
    bits: float
    best_tps: float | None
    sandboxed: bool  # neither heat nor load of this board has ever been seen

    def pressure_at(self, bits: float) -> float:
        """The pressure that leads to a budget."""
        low, high = self.policy.bounds
        return min(max((high - bits) / (high - low), 0.0), 1.0) if high > low else 0.0


@dataclass(frozen=True)
class Trigger:
    """One signal.

    value: None when unknown; describe: the reason, for people; smooth_s: time constant of its
    smoothing; forecast_s, forecast_most: how far ahead its slope is metered, and by how much at
    most; settle_s: how long after any change it may lower the budget again (a signal that the budget
    itself moves needs time to answer); rise_bits: the largest step up after it; sensor: whether
    losing it is worth a word.
    """

    value: Callable[[Situation], float | None]
    describe: Callable[[Readings], str]
    smooth_s: float = 0.0
    forecast_s: float = 0.0
    forecast_most: float = 0.0
    settle_s: float = 2.0
    rise_bits: float = math.inf
    sensor: bool = True


_BEFORE_OFF_C = 10.0  # below the temperature at which it switches off, a board that tells no other limit is hot


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


def _clock(at: Situation) -> float | None:
    """The share of its speed the processor is not allowed: only where nothing tells whether heat is why."""
    r = at.readings
    if r.heat_throttled is not None:
        return 0.0
    return None if r.cpu_freq_fraction is None else 1 - r.cpu_freq_fraction


def _battery(at: Situation) -> float | None:
    r = at.readings
    if r.discharging is False:
        return -1.0
    return None if r.discharging is None or r.battery_fraction is None else 1 - r.battery_fraction


def _cpu(at: Situation) -> float | None:
    r = at.readings
    return r.cpu_pressure if r.foreign_cpu_fraction is None else r.foreign_cpu_fraction


def _quota(at: Situation) -> float | None:
    """The share of periods in which a limit stops us, or of the engine's threads it leaves no time for.

    The second stays when the engine runs on fewer threads and is stopped no more.
    """
    available, threads = at.readings.available_cpus, at.policy.threads
    withheld = 0.0 if available is None or threads is None else 1 - available / threads
    stopped = at.readings.cgroup_throttled_fraction
    if stopped is None:
        return withheld if withheld > 0 else None
    return max(stopped, withheld)


def _memory(at: Situation) -> float | None:
    """The pressure of the highest budget whose weights fit in what memory there is."""
    available = at.readings.available_memory_bytes
    if available is None or not at.policy.bytes_at:
        return None
    low, _ = at.policy.bounds
    fitting = [bits for bits, size in at.policy.bytes_at if size <= available]
    return at.pressure_at(max(fitting, default=low))


def _latency(at: Situation) -> float | None:
    """Moves the budget by the speed that is missing; a tenth more than asked is left as it is."""
    goal, tps = at.policy.min_tps, at.readings.tokens_per_s
    if goal is None or tps is None:
        return None
    missing = 1 - tps / goal
    if -0.1 <= missing <= 0:
        return at.pressure_at(at.bits)
    # Only part of a token's time follows the bits, so that lowering needs more than its share and raising less.
    return at.pressure_at(at.bits * (1 - missing * (1.5 if missing > 0 else 0.5)))


def _lifetime(at: Situation) -> float | None:
    """Moves the budget by the power that is too much for the battery to last; unknown where it is not measured."""
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


def _pace(at: Situation) -> float | None:
    """The share of its best speed the model has lost, where nothing else tells of heat or load."""
    tps = at.readings.tokens_per_s
    if not at.sandboxed or tps is None or at.best_tps is None:
        return None
    return 1 - tps / at.best_tps


def _say(value: float | None, form: str) -> str:
    return "?" if value is None else format(value, form)


def _say_heat(r: Readings) -> str:
    return f"heat: {_say(r.temp_c, '.1f')} C, the limit is {_say(_limit_c(r), '.0f')} C"


def _say_cpu(r: Readings) -> str:
    if r.foreign_cpu_fraction is None:
        return f"cpu: programs wait for it {_say(r.cpu_pressure, '.0%')} of the time"
    return f"cpu: other programs take {_say(r.foreign_cpu_fraction, '.0%')}"


def _say_quota(r: Readings) -> str:
    stops = f"it stops us in {_say(r.cgroup_throttled_fraction, '.0%')} of its periods"
    return f"quota: the cgroup's limit is {_say(r.available_cpus, '.1f')} processors, {stops}"


def _say_lifetime(r: Readings) -> str:
    return f"lifetime: {_say(r.power_w, '.1f')} W is too much for {_say(r.battery_energy_wh, '.1f')} Wh to last"


TRIGGERS: dict[str, Trigger] = {
    "heat": Trigger(_heat, _say_heat, smooth_s=5, forecast_s=20, forecast_most=3, settle_s=20, rise_bits=1),
    "throttle": Trigger(_throttle, lambda r: "throttle: heat slows the board now", rise_bits=1),
    "supply": Trigger(_supply, lambda r: "supply: under-voltage slows the board now", rise_bits=1),
    "clock": Trigger(_clock, lambda r: f"clock: held at {_say(r.cpu_freq_fraction, '.0%')}", smooth_s=5, rise_bits=1),
    "battery": Trigger(_battery, lambda r: f"battery: {_say(r.battery_fraction, '.0%')} left", settle_s=20),
    "cpu": Trigger(_cpu, _say_cpu, smooth_s=1.2),
    "quota": Trigger(_quota, _say_quota, smooth_s=1.2),
    "memory": Trigger(_memory, lambda r: f"memory: {_say(r.available_memory_bytes, ',')} bytes available"),
    "pace": Trigger(
        _pace, lambda r: f"pace: down to {_say(r.tokens_per_s, '.1f')} tokens/s", smooth_s=5, settle_s=20, rise_bits=1,
        sensor=False,
    ),
    "latency": Trigger(
        _latency, lambda r: f"latency: {_say(r.tokens_per_s, '.1f')} tokens/s", settle_s=3, rise_bits=0.5, sensor=False
    ),
    "lifetime": Trigger(_lifetime, _say_lifetime, smooth_s=20, settle_s=60, rise_bits=0.5, sensor=False),
}  # fmt: skip
