from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_bundle import facts

from mbq_runtime.bundle.facts import Weights as ManifestWeights
from mbq_runtime.simulate.boards import BOARDS, find_board
from mbq_runtime.simulate.model import (
    SMOLLM2_135M,
    BoardState,
    Surroundings,
    Weights,
    advance,
    allowed_clock,
    cold,
    token_s,
)

PI = BOARDS["pi5-fan"]


def test_the_table_is_sound() -> None:
    assert set(BOARDS) >= {"pi5-bare", "pi5-fan", "orin-nano-15w", "phone", "laptop-battery"}
    for board in BOARDS.values():
        assert board.ambient_c < board.throttle_c < board.hard_c
        assert 0 < board.least_clock < 1
        assert 0 <= board.read_clock_share <= 1
    with pytest.raises(Exception, match="board 'pi6': neither a file nor one of pi5-bare, pi5-fan"):
        find_board("pi6")


def test_speed_by_bits_is_the_measured_one() -> None:
    """7.1 ms at 8 bits and 4.35 ms at 3, on a machine that reads 30.5 GB/s."""
    epyc = replace(PI, read_gb_s=30.5)
    assert token_s(epyc, SMOLLM2_135M, 8, 1.0) == pytest.approx(7.1e-3 + 0.44e-3, rel=0.02)  # bytes beside the planes
    assert token_s(epyc, SMOLLM2_135M, 8, 1.0) - token_s(epyc, SMOLLM2_135M, 3, 1.0) == pytest.approx(2.76e-3, rel=0.01)


def test_a_lower_clock_slows_the_overhead_and_part_of_the_reading() -> None:
    full, half = (token_s(PI, SMOLLM2_135M, 8, clock) for clock in (1.0, 0.5))
    read_s = SMOLLM2_135M.bytes_at(8) / 9.5e9
    assert full == pytest.approx(1.61 * read_s)
    assert half == pytest.approx((2 * 0.61 + 1.5) * read_s)


def test_the_clock_falls_between_the_two_limits() -> None:
    clocks = [allowed_clock(PI, temp_c) for temp_c in (20, 80, 82.5, 85, 120)]
    assert clocks == pytest.approx([1.0, 1.0, 0.8125, 0.625, 0.625])


def test_heat_settles_where_what_goes_in_goes_out() -> None:
    state, tokens_per_s = cold(PI), 0.0
    for _ in range(1800):
        stretch = advance(PI, SMOLLM2_135M, state, 8, seconds=1.0)
        state, tokens_per_s = stretch.state, stretch.tokens_per_s
    power_w = 3.0 + 6.0 + tokens_per_s * 142.89e6 * 60e-12
    assert stretch.power_w == pytest.approx(power_w)
    assert state.body_c == pytest.approx(25 + 3.0 * power_w, abs=0.01)
    assert state.die_c == pytest.approx(25 + 4.2 * power_w, abs=0.01)


def test_the_battery_loses_what_is_drawn() -> None:
    laptop = BOARDS["laptop-battery"]
    state, joules = cold(laptop), 0.0
    for _ in range(600):
        stretch = advance(laptop, SMOLLM2_135M, state, 8, seconds=1.0)
        state = stretch.state
        joules += stretch.power_w
    assert state.battery_wh == pytest.approx(50.0 - joules / 3600)
    empty = advance(laptop, SMOLLM2_135M, BoardState(25.0, 25.0, 1.0, 0.0), 8, seconds=1.0)
    assert empty.state.battery_wh == 0.0


def test_a_demand_below_the_speed_leaves_the_cores_idle_in_between() -> None:
    flat_out = advance(PI, SMOLLM2_135M, cold(PI), 8, seconds=1.0)
    half = advance(
        PI, SMOLLM2_135M, cold(PI), 8, seconds=1.0, around=Surroundings(demand_tps=flat_out.tokens_per_s / 2)
    )
    assert half.tokens_per_s == pytest.approx(flat_out.tokens_per_s / 2)
    assert half.decode_tps == flat_out.decode_tps
    assert half.power_w - PI.idle_w == pytest.approx((flat_out.power_w - PI.idle_w) / 2)
    assert advance(PI, SMOLLM2_135M, cold(PI), 8, seconds=1.0, around=Surroundings(demand_tps=1e6)) == flat_out


def test_weights_of_a_bundle() -> None:
    manifest = replace(facts(), weights=ManifestWeights(0, {"8": 8100, "3": 3100, "4": 4100}, ()))
    weights = Weights.of(manifest)
    assert (weights.low_bits, weights.high_bits) == (3.0, 8.0)
    assert [weights.bytes_at(bits) for bits in (3, 4, 8)] == [3100, 4100, 8100]
