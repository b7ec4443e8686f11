"""A simulated time on each board: the policies do what they promise."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest

from mbq_runtime.errors import UsageError
from mbq_runtime.simulate.boards import BOARDS
from mbq_runtime.simulate.closed_loop import PolicyRun, contenders, simulate
from mbq_runtime.simulate.model import SMOLLM2_135M

STEADY_S = 600.0
OTHER_POLICIES = ("battery", "cool", "quality")
_WARM = ("pi5-bare", "phone")
_HOURS, _SHORT_HOURS = 0.7, 0.25


@cache
def an_hour(board: str, policy: str, demand_tps: float | None = None) -> PolicyRun:
    ((name, row),) = contenders([policy], SMOLLM2_135M.low_bits, SMOLLM2_135M.high_bits)
    hours = _HOURS if board in _WARM and policy in ("auto", "fixed 8") else _SHORT_HOURS
    return simulate(BOARDS[board], SMOLLM2_135M, name, row, hours=hours, demand_tps=demand_tps)


def figure(run: PolicyRun, name: str) -> float:
    value = run.figures()[name]
    assert value is not None
    return value


def throttles(board: str) -> bool:
    return figure(an_hour(board, "fixed 8"), "above_throttle_share") > 0


def test_the_boards_differ_in_what_matters() -> None:
    assert {board for board in BOARDS if throttles(board)} == {"pi5-bare", "phone"}


@pytest.mark.parametrize("board", BOARDS)
def test_auto_stays_below_the_hard_limit(board: str) -> None:
    assert figure(an_hour(board, "auto"), "hottest_c") < BOARDS[board].hard_c


@pytest.mark.parametrize("board", BOARDS)
def test_auto_holds_its_share_of_the_speed_and_costs_nothing_where_the_board_does_not_throttle(board: str) -> None:
    fixed, auto = an_hour(board, "fixed 8"), an_hour(board, "auto")
    if throttles(board):
        quiet_tps = fixed.samples[0].tokens_per_s
        assert quiet_tps is not None
        last = [sample.tokens_per_s or 0.0 for sample in auto.samples[-600:]]
        assert min(last) >= 0.79 * quiet_tps > (fixed.samples[-1].tokens_per_s or 0.0)
        assert figure(auto, "mean_bits") > 7.0
    else:
        assert auto.figures() == fixed.figures()
        assert figure(auto, "mean_bits") == 8.0


@pytest.mark.parametrize("policy", ["auto", *(pytest.param(p, marks=pytest.mark.heavy) for p in OTHER_POLICIES)])
@pytest.mark.parametrize("board", BOARDS)
def test_no_policy_oscillates(board: str, policy: str) -> None:
    switches = an_hour(board, policy).switches
    assert len(switches) <= 40
    assert all(after - before >= 10 for before, after in pairwise(at for at in switches if at > STEADY_S))


def test_battery_saves_energy_on_battery_alone() -> None:
    assert figure(an_hour("laptop-battery", "battery"), "mean_bits") < 6.5
    assert figure(an_hour("laptop-battery", "battery"), "joules_per_token") < 0.9 * figure(
        an_hour("laptop-battery", "auto"), "joules_per_token"
    )
    assert figure(an_hour("orin-nano-15w", "battery"), "mean_bits") == 8.0


def test_at_a_given_speed_fewer_bits_keep_the_board_below_its_throttle_point() -> None:
    assert figure(an_hour("pi5-bare", "fixed 8", 20.0), "above_throttle_share") > 0.5
    auto = an_hour("pi5-bare", "auto", 20.0)
    assert figure(auto, "above_throttle_share") == 0.0
    assert figure(auto, "tokens_per_s") == pytest.approx(20.0)
    assert 4.0 < figure(auto, "mean_bits") < 8.0


def test_the_same_run_twice() -> None:
    ((name, row),) = contenders(["auto"], 4.0, 8.0)
    assert simulate(BOARDS["phone"], SMOLLM2_135M, name, row, hours=_HOURS) == an_hour("phone", "auto")


@pytest.mark.parametrize(
    ("name", "message"),
    [("auto 4", "only fixed takes a number"), ("fixed four", "'four' is no number"), ("eco", "needed one of fixed")],
)
def test_what_is_no_contender(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        contenders([name], 4.0, 8.0)
