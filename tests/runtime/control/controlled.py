"""A board, a bundle and a controller for the tests of control."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from tiny_bundle import facts

from mbq_runtime.bundle.manifest import Manifest
from mbq_runtime.control.controller import Decision, start, step
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
