"""A board, a bundle and a controller for the tests of control."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from tiny_bundle import facts

from mbq_runtime.bundle.manifest import Manifest
from mbq_runtime.control.controller import Decision, State, start, step
from mbq_runtime.control.policy import POLICIES, Policy
from mbq_runtime.sensing.readings import Readings

MANIFEST: Manifest = facts()  # 3 to 8 bits

CALM = Readings(
    time_s=0.0,
    temp_c=50.0,
    throttle_temp_c=80.0,
    critical_temp_c=110.0,
    heat_throttled=False,
    undervoltage=False,
    cpu_freq_fraction=1.0,
    discharging=False,
    battery_fraction=0.9,
    battery_energy_wh=40.0,
    power_w=6.0,
    foreign_cpu_fraction=0.0,
    cpu_pressure=0.0,
    available_cpus=4.0,
    cgroup_throttled_fraction=0.0,
    available_memory_bytes=10**9,
    tokens_per_s=20.0,
)
"""Readings of a board that has every sensor and no limit near."""


def policy(name: str = "auto", **changes: object) -> Policy:
    return replace(POLICIES[name], **changes).within(MANIFEST)  # type: ignore[arg-type]


def run(
    readings_at: Callable[[float], Readings], seconds: float, by: Policy | None = None, period_s: float = 0.5
) -> Iterator[tuple[float, Decision]]:
    """Yield (time, decision) of a controller.  Every ``period_s`` it gets readings from a function of the time."""
    by = by or policy()
    state = start(by)
    for i in range(round(seconds / period_s) + 1):
        decision = step(state, readings_at(i * period_s), 1000 + i * period_s, by)
        state = decision.state
        yield i * period_s, decision


def changes(decisions: Iterator[tuple[float, Decision]]) -> list[tuple[float, float]]:
    """(time, new budget) of each change after the start at 8 bits."""
    found, last = [], 8.0
    for at, decision in decisions:
        if decision.budget != last:
            last = decision.budget
            found.append((at, last))
    return found


@dataclass(frozen=True)
class Plant:
    """A model whose token takes ``whole_s`` at 8 bits; ``share`` of it depends on the bytes."""

    whole_s: float = 0.05
    share: float = 0.7

    def tps(self, bits: float, slowdown: float = 1.0) -> float:
        return 1 / (self.whole_s * slowdown * (1 - self.share + self.share * bits / 8))


def drive(
    plant: Callable[[float], Plant],
    load: Callable[[float], float],
    seconds: float,
    by: Policy | None = None,
    period_s: float = 0.4,
    state: State | None = None,
) -> Iterator[tuple[float, Decision, float]]:
    """Yield (time, decision, tokens/s) of a controller whose board slows down by a load.

    plant: the model at a time; load: share of the processors that other programs use at a time.  A look sees the mean
    load since the last one.  A load of 0.5 makes a token take twice as long.
    """
    by = by or policy()
    state = state or start(by)
    for i in range(round(seconds / period_s) + 1):
        at = i * period_s
        share = sum(load(at - period_s * j / 20) for j in range(20)) / 20
        tps = plant(at).tps(state.bits, 1 / (1 - share))
        decision = step(state, replace(CALM, tokens_per_s=tps, foreign_cpu_fraction=share), 1000 + at, by)
        yield at, decision, tps
        state = decision.state
