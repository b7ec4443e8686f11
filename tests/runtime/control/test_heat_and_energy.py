"""Heat by forecast and battery by energy, on boards whose physics is known."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from controlled import CALM, Plant, policy

from mbq_runtime.control.controller import start, step
from mbq_runtime.control.energy import Energy, describe, describe_saving
from mbq_runtime.control.heat import Heat
from mbq_runtime.control.learned import Learned
from mbq_runtime.control.policy import Policy
from mbq_runtime.control.watts import Watts
from mbq_runtime.sensing.readings import Readings

PLANT = Plant(whole_s=0.05)


@dataclass
class Warm:
    """A board that decodes ``demand_tps`` tokens/s, or without pause.  Watts: 3 + 6 * share of the time."""

    demand_tps: float | None
    k_per_w: float = 8.0
    tau_s: float = 200.0
    temp_c: float = 30.0
    battery_wh: float = 40.0
    sensed_power: bool = True

    def look(self, bits: float, seconds: float, noise: random.Random) -> Readings:
        token_s = 1 / PLANT.tps(bits)
        share = 1.0 if self.demand_tps is None else min(self.demand_tps * token_s, 1.0)
        power_w = 3 + 6 * share
        settled_c = 25 + self.k_per_w * power_w
        self.temp_c = settled_c + (self.temp_c - settled_c) * math.exp(-seconds / self.tau_s)
        self.battery_wh -= power_w * seconds / 3600
        return replace(
            CALM, temp_c=self.temp_c + noise.gauss(0, 0.3), power_w=power_w if self.sensed_power else None,
            tokens_per_s=1 / token_s, decode_share=share, battery_energy_wh=self.battery_wh,
        )  # fmt: skip


def run(board: Warm, seconds: int, by: Policy | None = None, **changes: object) -> list[tuple[int, float, float]]:
    """(time, budget, temperature) of each second."""
    by, noise, found = by or policy(), random.Random(0), []
    state = start(by)
    for now in range(seconds):
        readings = replace(board.look(state.bits, 1.0, noise), **changes)  # type: ignore[arg-type]
        state, bits, reason = step(state, readings, float(now), by)
        found.append((now, bits, board.temp_c))
    assert reason
    return found


@pytest.mark.parametrize("sensed_power", [True, False])
def test_a_board_that_would_get_too_hot_is_kept_at_its_limit(sensed_power: bool) -> None:
    """At 18 tokens/s 8 bits end at 92 C, the exact answer for 79 C is 5.0 bits."""
    found = run(Warm(18.0, sensed_power=sensed_power), 1200)
    assert max(temp_c for *_, temp_c in found) < 80.0, "the limit itself"
    assert {bits for at, bits, _ in found if at < 150} == {8.0}, "nothing is given while it is cool"
    late = [bits for at, bits, _ in found if at > 700]
    assert 4.4 <= sum(late) / len(late) <= 5.2
    changed = [at for (_, before, _), (at, bits, _) in pairwise(found) if bits != before and at > 600]
    assert all(after - before >= 10 for before, after in pairwise(changed))


def test_no_bits_are_given_where_they_do_not_cool() -> None:
    """Without pause fewer bits make more tokens of the same heat, and this board is at 79.5 C in the end."""
    assert {bits for _, bits, _ in run(Warm(None, k_per_w=6.05), 700)} == {8.0}


def test_a_fan_that_stops_is_learned_again_within_a_minute() -> None:
    heat, temp_c, k_per_w = Heat(), 30.0, 3.0
    for second in range(900):
        if second == 600:
            k_per_w = 8.0
            assert heat.settled_c(0.8) == pytest.approx(25 + 3.0 * 8, abs=3)
        settled_c = 25 + k_per_w * 8
        temp_c += (settled_c - temp_c) / 150
        heat = heat.after(temp_c, 0.8, 1.0)
        if second == 660:
            assert heat.forecast_c(temp_c, 0.8, 60.0) == pytest.approx(
                settled_c + (temp_c - settled_c) * math.exp(-60 / 150), abs=3
            )


def test_the_heat_of_a_known_board() -> None:
    noise, heat, temp_c = random.Random(3), Heat(), 40.0
    for second in range(3000):
        drive = 0.9 if second // 300 % 2 else 0.3
        settled_c = 30 + 50 * drive
        temp_c += (settled_c - temp_c) / 120
        heat = heat.after(temp_c + noise.gauss(0, 0.3), drive, 1.0)
    assert heat.tau_s == pytest.approx(120, rel=0.2)
    assert [heat.settled_c(drive) for drive in (0.3, 0.9)] == pytest.approx([45, 75], abs=3)


def test_absurd_temperatures_and_powers_teach_nothing() -> None:
    heat, watts = Heat(), Watts()
    for temp_c in (math.nan, 1e9, -1e9):
        assert heat.after(temp_c, 0.5, 1.0) == heat
    for power_w in (math.nan, -5.0, 0.0, 1e9):
        assert watts.after(power_w, 0.5, 1.0, 1.0) == watts
    for second in range(300):  # a sensor that jumps by 100 C every 8 s
        heat = heat.after(20.0 + 100 * (second // 8 % 2), 0.5, 1.0)
    assert heat.rate == Heat().rate


def test_a_battery_lasts_by_its_energy() -> None:
    """40 Wh for 5 hours allow 8 W.  At 18 tokens/s 8 bits need 8.4 W, 6.5 bits 7.7 W and 7 bits 7.9 W."""
    board = Warm(18.0, k_per_w=2.0)
    by = policy(last_until_s=5 * 3600.0)
    found = run(board, 600, by, discharging=True)
    assert {bits for at, bits, _ in found if at > 60} == {7.0}
    assert board.battery_wh - 4.83 * 7.915 > 0


def test_no_bits_are_given_where_they_save_no_energy() -> None:
    board = Warm(None, k_per_w=2.0)
    assert {bits for at, bits, _ in run(board, 300, policy(last_until_s=5 * 3600.0), discharging=True) if at > 120} == {
        8.0
    }


def test_the_error_of_the_energy_is_that_of_its_periods() -> None:
    """0.4, 0.5 and 0.6 J/token over 10 tokens each: standard deviation 0.0816, over the square root of 2."""
    energy = Energy()
    for power_w in (4.0, 5.0, 6.0):
        energy = energy.add(power_w, 1.0, 10)
    assert energy.joules_per_token == pytest.approx(0.5)
    assert energy.error_j == pytest.approx(0.0816 / math.sqrt(2), rel=1e-2)
    assert describe(energy.joules_per_token, energy.error_j) == "0.5 ± 0.06 J/token"
    assert Energy().add(4.0, 1.0, 10).error_j is None


def test_fewer_bits_that_save_joules_but_no_watts_are_named() -> None:
    """A token of 8,000 bytes takes 50 ms, one of 3,000 bytes 28 ms, both at 9 W."""
    learned, watts = Learned(), Watts()
    for second in range(60):
        bits = 8.0 if second % 2 else 3.0
        learned = learned.with_token(1, bits / 8, 1 / PLANT.tps(bits), 0.5)
        watts = watts.after(9.0, 1.0, 0.0, 1.0).after(3.0, 0.0, 0.0, 1.0)
    assert describe_saving(replace(learned, watts=watts), policy(), 1) == (
        "3 bits instead of 8 save 44% of the energy of a token and 0% of the watts, so they cool nothing without "
        "pauses; the idle board draws 3.0 W"
    )
    assert describe_saving(Learned(), policy(), 1) is None
