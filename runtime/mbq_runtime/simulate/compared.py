"""Policies beside the oracle in a situation: quality given away, goals missed, time above the limit, energy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from mbq_runtime.control.policy import Policy
from mbq_runtime.control.wishes import grid
from mbq_runtime.sensing.readings import Readings

from .boards import BOARDS, Board
from .closed_loop import Decides, Follower, PolicyRun, Sample, drive
from .model import Surroundings, Weights, allowed_clock, cold, thread_speed, token_s
from .oracle import best_threads, budgets
from .situations import Situation

MARGIN_C = 1.0
"""The oracle stays this far below the throttle point, as the policy ``auto`` aims to."""
KEPT_SPEED = 0.8
_REACTION_S = 4  # a controller may miss a goal for this long after something begins: 3 s and one look of 1 s
_STEADY_S = 60  # a budget is steady this long after the surroundings change
_SEEN = 0.06  # a smaller load is none
_NEAR = 0.98  # a speed this near to its goal does not miss it


@dataclass(frozen=True)
class Figures:
    """What a run gave away and gained.

    Args:
        kl_seconds: KL divergence above that of the highest budget, over the time, in nats a token times s.
        missed_s: time in s in which a speed goal was missed that some budget holds.
        above_s: time in s above the throttle point.
        past_hard_s: time in s above the hard limit of the board.
        joules: energy in J.
        tokens: number of tokens.
        mean_bits: mean budget.
        changes: changes of the budget.
        closest_s: shortest time in s between two changes in steady surroundings; None when there are fewer than two.
        lasts: whether the battery lasts as long as it must; None without such a goal.
    """

    kl_seconds: float
    missed_s: int
    above_s: int
    past_hard_s: int
    joules: float
    tokens: float
    mean_bits: float
    changes: int
    closest_s: float | None
    lasts: bool | None


class _Known:
    """Budgets that were chosen before, with the best threads."""

    def __init__(self, bits: Sequence[float], threads: Sequence[int]) -> None:
        self._left = list(zip(bits, threads, strict=True))[::-1]
        self.threads = threads[0]
        self.pace_tps: float | None = None

    def decide(self, readings: Readings) -> tuple[float, str]:
        bits, self.threads = self._left.pop()
        return bits, "known"


class Trial:
    """A situation, and what can be compared in it.

    Args:
        situation: the situation.
        weights: sizes and divergences of the model.
        board: the board; None: the one that the situation names.
    """

    def __init__(self, situation: Situation, weights: Weights, board: Board | None = None) -> None:
        self.situation, self.weights = situation, weights
        self.board = board or BOARDS[situation.board]
        if situation.battery_wh is not None:
            self.board = replace(self.board, battery_wh=situation.battery_wh)
        self.around = [situation.around(float(second)) for second in range(situation.seconds)]
        usual = thread_speed(self.board, best_threads(self.board, self.around[0]), self.around[0])
        quiet_tps = usual / token_s(self.board, weights, weights.high_bits, 1.0)
        self.goal_tps = situation.min_tps or KEPT_SPEED * quiet_tps

    def follow(self, policy: Policy) -> Follower:
        """A policy of this project in the situation.

        Args:
            policy: a policy that has bounds.
        """
        return Follower(self.with_goals(policy), self.board, self.weights)

    def with_goals(self, policy: Policy) -> Policy:
        """A policy with the goals of the situation.

        Args:
            policy: the policy.
        """
        return replace(policy, min_tps=self.situation.min_tps, last_until_s=self.situation.last_s)

    def run(self, name: str, by: Decides) -> PolicyRun:
        """The run of something that decides.

        Args:
            name: name of the run.
            by: what decides.
        """
        return drive(self.board, self.weights, name, by, self.around, state=cold(self.board))

    def oracle(self) -> PolicyRun:
        """The run of the oracle."""
        situation, board = self.situation, self.board
        goals = [self.goal_tps if held or situation.min_tps else None for held in _held(self.around)]
        energy_wh = None
        if situation.last_s is not None and board.battery_wh is not None:
            energy_wh = board.battery_wh * min(situation.seconds / situation.last_s, 1.0)
        bits = budgets(
            board, self.weights, self.around, grid(self.weights.low_bits, self.weights.high_bits), goals,
            highest_c=board.throttle_c - MARGIN_C, energy_wh=energy_wh,
        )  # fmt: skip
        return self.run("oracle", _Known(bits, [best_threads(board, around) for around in self.around]))

    def figures(self, run: PolicyRun) -> Figures:
        """The figures of a run.

        Args:
            run: a run of this situation.
        """
        samples = run.samples
        temps = [sample.temp_c or 0.0 for sample in samples]
        joules = sum(sample.power_w or 0.0 for sample in samples)
        lasts = None
        if self.situation.last_s is not None and self.board.battery_wh is not None:
            # The mean power of the last ten minutes holds for the rest of the time.
            late_w = sum(sample.power_w or 0.0 for sample in samples[-600:]) / len(samples[-600:])
            rest_s = max(self.situation.last_s - len(samples), 0.0)
            lasts = joules + late_w * rest_s <= 3600 * self.board.battery_wh * 1.01
        return Figures(
            kl_seconds=sum(sample.nats or 0.0 for sample in samples),
            missed_s=sum(self._misses(samples)),
            above_s=sum(sample.above for sample in samples),
            past_hard_s=sum(temp_c > self.board.hard_c for temp_c in temps),
            joules=joules,
            tokens=sum(sample.tokens_per_s or 0.0 for sample in samples),
            mean_bits=sum(sample.bits for sample in samples) / len(samples),
            changes=len(run.switches),
            closest_s=self._closest_s(run.switches),
            lasts=lasts,
        )

    def _misses(self, samples: Sequence[Sample]) -> Iterator[bool]:
        held = _held(self.around)
        for i, (sample, around) in enumerate(zip(samples, self.around, strict=True)):
            settled = held[i] and all(before == around for before in self.around[max(i - _REACTION_S, 0) : i])
            goal_tps = _NEAR * min(self.goal_tps, self._reachable(around, sample.temp_c or 0.0))
            yield settled and (sample.decode_tps or 0.0) < goal_tps

    def _reachable(self, around: Surroundings, temp_c: float) -> float:
        """The speed at the lowest budget, in tokens/s."""
        speed = thread_speed(self.board, best_threads(self.board, around), around)
        return speed / token_s(self.board, self.weights, self.weights.low_bits, allowed_clock(self.board, temp_c))

    def _closest_s(self, switches: Sequence[float]) -> float | None:
        steady = [
            at for at in switches
            if len(set(self.around[max(int(at) - _STEADY_S, 0) : int(at) + 1])) == 1 and at >= _STEADY_S
        ]  # fmt: skip
        return min((after - before for before, after in pairwise(steady)), default=None)


def _held(around: Sequence[Surroundings]) -> list[bool]:
    """Whether a speed is to be held at each second: not in a load that is shorter than the time of reaction."""
    held, begin = [True] * len(around), 0
    for i in range(len(around) + 1):
        if i < len(around) and around[i].load > _SEEN:
            continue
        if 0 < i - begin <= _REACTION_S:
            held[begin:i] = [False] * (i - begin)
        begin = i + 1
    return held
