"""A policy and the model of a board in a closed loop, and the figures of the run."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

from mbq_runtime.bundle.slice_profile import CODE_BITS
from mbq_runtime.control.ladder import Ladder, climb
from mbq_runtime.control.policy import Policy, find_policy
from mbq_runtime.control.threads import Threads
from mbq_runtime.errors import UsageError
from mbq_runtime.sensing.readings import Readings

from .boards import Board
from .model import USUAL, BoardState, Stretch, Surroundings, Weights, advance, cold

PERIOD_S = 1.0
"""Time between two steps of the controller, in s."""
_NOISE_C = 0.5  # standard deviation of a temperature sensor


@dataclass(frozen=True)
class Sample:
    """The state at one step of the controller.

    Args:
        time_s: time since the start, in s.
        bits: the budget, in average bits per weight.
        temp_c: temperature in C; None is unknown.
        above: whether the temperature is above the throttle point.
        tokens_per_s: speed; None is unknown.
        power_w: power in W; None is unknown.
        reason: the cause of the budget, as text for people.
        decode_tps: speed without the pauses, in tokens/s; None is unknown.
        nats: KL divergence that is given away, in nats a token; None is unknown.
    """

    time_s: float
    bits: float
    temp_c: float | None
    above: bool
    tokens_per_s: float | None
    power_w: float | None
    reason: str
    decode_tps: float | None = None
    nats: float | None = None


@dataclass(frozen=True)
class PolicyRun:
    """The course of one policy over time.

    Args:
        name: name of the policy, such as "fixed 8".
        samples: one sample for each step of the controller.
    """

    name: str
    samples: Sequence[Sample]

    @property
    def switches(self) -> list[float]:
        """The times at which the budget changed, in s."""
        return [after.time_s for before, after in pairwise(self.samples) if after.bits != before.bits]

    def figures(self) -> dict[str, float | None]:
        """The figures of the run by name: means and shares over its samples; None is unknown."""
        speeds = [sample.tokens_per_s for sample in self.samples if sample.tokens_per_s is not None]
        powers = [sample.power_w for sample in self.samples if sample.power_w is not None]
        temps = [sample.temp_c for sample in self.samples if sample.temp_c is not None]
        count = len(self.samples)
        tokens_known = len(speeds) == count and sum(speeds) > 0
        return {
            "tokens_per_s": sum(speeds) / count if tokens_known else None,
            "mean_bits": sum(sample.bits for sample in self.samples) / count,
            "joules_per_token": sum(powers) / sum(speeds) if tokens_known and len(powers) == count else None,
            "above_throttle_share": sum(sample.above for sample in self.samples) / count if temps else None,
            "hottest_c": max(temps, default=None),
            "switches": len(self.switches),
        }


def contenders(names: Sequence[str], low_bits: float, high_bits: float) -> list[tuple[str, Policy]]:
    """The policies to compare, with bounds.

    >>> [policy.bounds for _, policy in contenders(["auto", "fixed 4"], low_bits=3.0, high_bits=8.0)]
    [(3.0, 8.0), (4.0, 4.0)]

    Args:
        names: names such as "auto" or "fixed 4".
        low_bits: floor of policies without a number, in average bits per weight.
        high_bits: ceiling of policies without a number, in average bits per weight.

    Returns:
        Pairs of a name and a policy.

    Raises:
        UsageError: a name is not a policy, or its number is not usable.
    """
    found = []
    for name in names:
        row, _, bits = name.partition(" ")
        policy = find_policy(row)
        if bits and policy.bands:
            raise UsageError(f"policy {name!r}: only fixed takes a number of bits")
        bounds = (_fixed(name, bits),) * 2 if bits else (low_bits, high_bits)
        found.append((name, replace(policy, floor_bits=bounds[0], ceiling_bits=bounds[1])))
    return found


def _fixed(name: str, bits: str) -> float:
    """The budget that a policy's name gives."""
    try:
        value = float(bits)
    except ValueError:
        value = math.nan
    if not 1 <= value <= CODE_BITS:
        raise UsageError(f"policy {name!r}: {bits!r} is no number of bits from 1 to {CODE_BITS}")
    return value


class Follower:
    """A policy that follows a simulated board: the controller and the number of threads.

    Args:
        policy: a policy that has bounds.
        board: the board.
        weights: sizes of the model.
    """

    def __init__(self, policy: Policy, board: Board, weights: Weights) -> None:
        self._policy = replace(policy, bytes_at=weights.bytes_at_budgets, threads=board.cpus)
        self._ladder = Ladder.of(self._policy, Threads.of(board.cpus, board.cpus))
        self.threads = board.cpus
        self.pace_tps: float | None = None

    def decide(self, readings: Readings) -> tuple[float, str]:
        """The budget in average bits per weight, and the reason as text for people.

        It also sets ``threads`` and ``pace_tps``.

        Args:
            readings: what the sensors show now.
        """
        look = climb(self._ladder, readings, readings.time_s, self._policy)
        self._ladder = look.ladder
        self.threads = look.ladder.threads.count
        self.pace_tps = self._policy.reader_tps if look.ladder.paced else None
        return look.ladder.bits.bits, look.reason


class Decides(Protocol):
    """What chooses the budget, the threads and the pace of a simulated board; see ``Follower``."""

    threads: int
    pace_tps: float | None

    def decide(self, readings: Readings) -> tuple[float, str]:
        """See ``Follower.decide``.

        Args:
            readings: what the sensors show now.
        """


def drive(
    board: Board,
    weights: Weights,
    name: str,
    by: Decides,
    around: Sequence[Surroundings],
    *,
    state: BoardState | None = None,
) -> PolicyRun:
    """Let a board decode under something that decides.  The same arguments give the same run.

    Args:
        board: the board.
        weights: sizes of the model.
        name: name of the run.
        by: what decides.
        around: the surroundings of each period.
        state: state of the board before; None: cold.
    """
    noise = random.Random(0)
    samples = []
    last = Stretch(state or cold(board), 0.0, 0.0, board.idle_w)
    threads, before = by.threads, USUAL
    for i, now in enumerate(around):
        readings = sense(board, last, i * PERIOD_S, noise.gauss(0.0, _NOISE_C), before, threads=threads)
        bits, reason = by.decide(readings)
        if by.pace_tps is not None:
            now = replace(now, demand_tps=by.pace_tps if now.demand_tps is None else min(now.demand_tps, by.pace_tps))
        threads, before = by.threads, now
        last = advance(board, weights, last.state, bits, seconds=PERIOD_S, around=now, threads=threads)
        die_c = last.state.die_c
        samples.append(
            Sample(i * PERIOD_S, bits, die_c, die_c > board.throttle_c, last.tokens_per_s, last.power_w or None, reason,
                   decode_tps=last.decode_tps, nats=weights.given_away(bits) if now.demand_tps != 0 else 0.0)
        )  # fmt: skip
    return PolicyRun(name, samples)


def simulate(
    board: Board, weights: Weights, name: str, policy: Policy, *, hours: float = 1.0, demand_tps: float | None = None
) -> PolicyRun:
    """Let a board decode under a policy.  The same arguments give the same run.

    Args:
        board: the board.
        weights: sizes of the model.
        name: name of the run.
        policy: a policy that has bounds.
        hours: length of the run, in h.
        demand_tps: speed that is asked for, in tokens/s; None: decode without pauses.
    """
    around = [replace(USUAL, demand_tps=demand_tps)] * round(hours * 3600 / PERIOD_S)
    return drive(board, weights, name, Follower(policy, board, weights), around)


def sense(
    board: Board,
    stretch: Stretch,
    time_s: float,
    noise_c: float,
    around: Surroundings = USUAL,
    *,
    threads: int | None = None,
) -> Readings:
    """The readings that the sensors of the board would give.

    Args:
        board: the board.
        stretch: the last stretch of decoding.
        time_s: time since the start, in s.
        noise_c: error of the temperature sensor, in K.
        around: the surroundings of the last stretch.
        threads: number of threads in the last stretch; None: all cores.
    """
    limit_cpus, threads = around.limit_cpus or board.cpus, threads or board.cpus
    physical = stretch.state
    on_battery = physical.battery_wh is not None and board.battery_wh is not None and around.unplugged
    return Readings(
        time_s=time_s,
        temp_c=physical.die_c + noise_c,
        throttle_temp_c=board.throttle_c,
        critical_temp_c=board.hard_c,
        heat_throttled=physical.clock < 1,
        undervoltage=False,
        cpu_freq_fraction=physical.clock,
        discharging=on_battery,
        battery_fraction=physical.battery_wh / board.battery_wh if on_battery else None,  # type: ignore[operator]
        battery_energy_wh=physical.battery_wh,
        power_w=stretch.power_w,
        foreign_cpu_fraction=around.load,
        available_cpus=float(limit_cpus),
        cgroup_throttled_fraction=max(1 - limit_cpus / threads, 0.0) * bool(stretch.decode_tps),
        tokens_per_s=stretch.decode_tps or None,
        decode_share=stretch.tokens_per_s / stretch.decode_tps if stretch.decode_tps else 0.0,
        decode_threads=threads,
    )
