"""Situations, the oracle, and what ``auto`` gives away beside it."""

from __future__ import annotations

import json
from functools import cache

import pytest

from mbq_runtime import cli
from mbq_runtime.simulate.boards import BOARDS
from mbq_runtime.simulate.closed_loop import PolicyRun, contenders
from mbq_runtime.simulate.compared import Figures, Trial
from mbq_runtime.simulate.model import SMOLLM2_135M, USUAL, Weights
from mbq_runtime.simulate.situations import SITUATIONS

QUICK = ("pi-update", "container-limit", "orin-dusty")


@cache
def trial(name: str) -> Trial:
    return Trial(SITUATIONS[name], SMOLLM2_135M)


@cache
def oracle(name: str) -> Figures:
    return trial(name).figures(trial(name).oracle())


def follow(name: str, policy: str) -> PolicyRun:
    ((_, row),) = contenders([policy], 4.0, 8.0)
    return trial(name).run(policy, trial(name).follow(row))


def test_the_table_is_sound() -> None:
    assert len(SITUATIONS) == 25
    assert list(SITUATIONS)[:5] == list(BOARDS)
    for situation in SITUATIONS.values():
        around = [situation.around(at) for at in range(situation.seconds)]
        assert situation.board in BOARDS
        assert len(set(around)) > 1 or situation.name in BOARDS or around[0] != USUAL
        assert all(0 <= now.load < 1 and now.cooling > 0 for now in around)


@pytest.mark.parametrize("name", QUICK)
def test_auto_gives_away_little_more_than_the_oracle(name: str) -> None:
    run = follow(name, "auto")
    auto, best = trial(name).figures(run), oracle(name)
    assert 0 < auto.kl_seconds <= 1.6 * best.kl_seconds
    assert auto.missed_s == 0 == auto.past_hard_s
    assert auto.above_s == 0
    assert auto.closest_s is None or auto.closest_s >= 10
    assert max(s.temp_c or 0.0 for s in run.samples) < trial(name).board.throttle_c


@pytest.mark.parametrize("name", QUICK)
def test_the_oracle_meets_every_goal_and_no_fixed_budget_is_better(name: str) -> None:
    best = oracle(name)
    assert best.missed_s == 0 == best.above_s
    for bits in (6, 8):
        fixed = trial(name).figures(follow(name, f"fixed {bits}"))
        worse = fixed.missed_s > 0 or fixed.above_s > 0
        assert worse or fixed.kl_seconds > best.kl_seconds


@pytest.mark.heavy
def test_a_battery_that_must_last_lasts_under_the_oracle() -> None:
    assert oracle("laptop-flight").lasts
    assert not trial("laptop-flight").figures(follow("laptop-flight", "fixed 8")).lasts


def test_quality_given_away_is_that_of_the_curve() -> None:
    curve = Weights(3.0, 8.0, 0.0, 1.0, ((3.0, 0.4), (5.0, 0.1), (8.0, 0.01)))
    assert curve.given_away(8.0) == pytest.approx(0.0)
    assert curve.given_away(5.0) == pytest.approx(0.09)
    assert curve.given_away(4.0) == pytest.approx(0.2 - 0.01)
    assert Weights(3.0, 8.0, 0.0, 1.0).given_away(5.0) is None


def test_the_command_names_situations_and_shows_the_oracle(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", "list"]) == 0
    listed = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in listed] == list(SITUATIONS)
    assert cli.main(["simulate", "pi-backup", "--json", "--policy", "fixed 8", "--policy", "oracle"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert runs["fixed 8"]["missed_s"] > 0 == runs["oracle"]["missed_s"]
    assert runs["fixed 8"]["kl_seconds"] == 0 < runs["oracle"]["kl_seconds"]
