"""Budgets from need: what the controller learned about the speed says how many bits a load costs."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
from controlled import MANIFEST, Plant, drive, policy

from mbq_runtime.control.controller import State
from mbq_runtime.control.learned import Learned
from mbq_runtime.control.policy import Policy
from mbq_runtime.control.token_time import TokenTime

PLANT = Plant()
QUIET_TPS = PLANT.tps(8)


def steady(_: float) -> Plant:
    return PLANT


def budgets(
    load: Callable[[float], float],
    seconds: float,
    by: Policy | None = None,
    plant: Callable[[float], Plant] = steady,
) -> list[tuple[float, float]]:
    """(time, new budget) of each change."""
    found = [(at, decision.budget) for at, decision, _ in drive(plant, load, seconds, by)]
    return [(at, bits) for (_, before), (at, bits) in pairwise(found) if bits != before]


@pytest.mark.parametrize(("load", "expected"), [(0.1, 8.0), (0.24, 7.0), (0.35, 5.5), (0.45, 4.0), (0.6, 3.0)])
def test_a_load_costs_the_bits_that_the_speed_needs(load: float, expected: float) -> None:
    """The exact answer: the highest budget at which a token takes at most 1 / 0.8 of its time at 8 bits."""
    (*_, (_, decision, tps)) = drive(steady, lambda at: load * (at > 20), 60)
    assert decision.budget == expected
    if expected > 3:
        assert tps >= 0.8 * QUIET_TPS
        assert PLANT.tps(min(expected + 0.5, 8), 1 / (1 - load)) < 0.8 * QUIET_TPS or expected == 8
    else:
        assert PLANT.tps(3, 1 / (1 - load)) < 0.8 * QUIET_TPS


def test_the_reason_names_the_need() -> None:
    said = [decision.reason for _, decision, _ in drive(steady, lambda at: 0.24 * (at > 20), 40)]
    assert "cpu: holds 16.0 tokens/s beside a load of 24%: 7 bits" in said
    (*_, (_, decision, _)) = drive(steady, lambda at: 0.6 * (at > 20), 40)
    assert decision.reason == "cpu: 14.2 of 16.0 tokens/s beside a load of 60%: 3 bits"


@pytest.mark.parametrize("phase", [0.0, 0.13, 0.26, 0.39])
def test_a_spike_of_two_seconds_costs_nothing_and_a_long_load_is_met_within_3_s(phase: float) -> None:
    start_s = 20 + phase
    assert budgets(lambda at: 0.5 * (at > 20 and (at - phase) % 20 < 2), 120) == []
    (fall, *others) = budgets(lambda at: 0.5 * (start_s <= at < start_s + 60), 120)
    assert start_s + 2 < fall[0] <= start_s + 3
    assert others[-1][1] == 8.0
    assert others[-1][0] <= start_s + 60 + 15
    assert len(others) <= 3


def test_a_spike_counts_when_it_breaks_a_goal() -> None:
    assert budgets(lambda at: 0.5 * (at > 20 and at % 20 < 2), 60, policy(min_tps=0.9 * QUIET_TPS))


def test_a_goal_of_speed_is_held_from_the_first_seconds() -> None:
    found = list(drive(steady, lambda _: 0.3, 30, policy(min_tps=16.0)))
    assert all(tps >= 16.0 for at, _, tps in found if at > 15)
    assert found[-1][1].budget == 6.5


def test_small_changes_of_the_load_make_few_changes_of_the_budget() -> None:
    noise = random.Random(0)
    found = budgets(lambda at: 0.3 + noise.gauss(0, 0.05) if at > 20 else 0.0, 400)
    late = [at for at, _ in found if at > 60]
    assert all(after - before >= 10 for before, after in pairwise(late))
    assert len(late) <= 15


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_the_share_of_reading_is_learned_from_changes_of_the_budget(share: float) -> None:
    noise = random.Random(1)

    def plant(_: float) -> Plant:
        return Plant(0.05 * noise.gauss(1, 0.03), share)

    (*_, (_, decision, _)) = drive(plant, lambda at: 0.45 * (at > 20 and at % 60 < 30), 600)
    assert decision.state.learned.token_time(1).share == pytest.approx(share, abs=0.15)


def test_a_board_that_changes_is_learned_again_within_a_minute() -> None:
    """The governor of the clock halves the speed for good: nothing presses, and a load is met from the new speed."""

    def plant(at: float) -> Plant:
        return PLANT if at < 60 else Plant(0.1)

    found = list(drive(plant, lambda at: 0.24 * (at > 120), 180))
    assert {decision.budget for at, decision, _ in found if at <= 120} == {8.0}
    assert 1 / next(d for at, d, _ in found if at >= 119).state.learned.token_time(1).at(1.0) == pytest.approx(
        10, rel=0.05
    )
    assert found[-1][1].budget == 7.0


def test_the_line_finds_a_known_truth_and_keeps_it_within_bounds() -> None:
    noise, line = random.Random(2), TokenTime()
    for i in range(300):
        part = (1.0, 0.75, 0.5)[i // 10 % 3]
        line = line.after(part, 0.02 * (0.2 + 0.8 * part) * noise.gauss(1, 0.05), 0.4)
    assert line.at(1.0) == pytest.approx(0.02, rel=0.05)
    assert line.share == pytest.approx(0.8, abs=0.06)
    for token_s in (0.0, -1.0, 1e-300, 1e300, float("inf"), float("nan")):
        assert line.after(1.0, token_s, 0.4) == line
    for _ in range(1000):
        line = line.after(0.5, 1e3, 1.0).after(1.0, 1e-6, 1.0)
    assert 0.1 <= line.share <= 1.0
    assert 1e-6 <= line.at(1.0) <= 1e3


def test_what_is_learned_is_bounded() -> None:
    learned = Learned()
    for threads in range(1000):
        learned = learned.with_token(threads, 1.0, 0.01, 0.4)
    assert len(learned.token_times) <= 64


def test_the_part_of_the_bytes_follows_the_table_of_the_bundle() -> None:
    by = policy()
    assert [by.part(bits) for bits in (3, 5.5, 8)] == [3 / 8, 5.5 / 8, 1.0]
    assert policy(ceiling_bits=6.0).part(6.0) == 6 / 8, "of the bundle's highest budget, not of the policy's"
    assert MANIFEST.budget.max_bits == 8.0


def test_no_speed_is_missing_while_no_tokens_come() -> None:
    state: State | None = None
    for _, decision, _ in drive(steady, lambda _: 0.0, 20):
        state = decision.state
    assert state is not None
    found = list(drive(lambda _: Plant(float("inf")), lambda _: 0.5, 60, state=state))
    assert {decision.budget for at, decision, _ in found if at > 40} == {8.0}
