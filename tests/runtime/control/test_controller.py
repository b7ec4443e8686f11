from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import pytest
from controlled import CALM, changes, policy, run
from hypothesis import given, settings
from hypothesis import strategies as st

from mbq_runtime.control.controller import State, start, step
from mbq_runtime.control.policy import POLICIES, Policy
from mbq_runtime.control.triggers import TRIGGERS
from mbq_runtime.sensing.readings import Readings

NAMES = [f.name for f in fields(Readings)]
FLAGS = {"heat_throttled", "undervoltage", "discharging", "saving", "hidden"}
WHOLE = {"available_memory_bytes"}


def any_value(name: str) -> st.SearchStrategy[Any]:
    if name in FLAGS:
        return st.none() | st.booleans()
    if name in WHOLE:
        return st.none() | st.integers(0, 2**50)
    return st.none() | st.floats() | st.floats(0, 1) | st.floats(20, 100)


any_readings = st.builds(Readings, time_s=st.floats(), **{name: any_value(name) for name in NAMES if name != "time_s"})
any_policy = st.builds(
    policy,
    st.sampled_from(list(POLICIES)),
    floor_bits=st.none() | st.floats(3, 5),
    ceiling_bits=st.none() | st.floats(5, 8),
    min_tps=st.none() | st.floats(0.1, 100),
    last_until_s=st.none() | st.floats(0, 1e5),
)
any_now = st.floats() | st.floats(0, 1e4)
any_history = st.lists(st.tuples(any_readings, any_now), max_size=30)

# What each signal may show, from harmless to bad, while all others are harmless.
WORSE: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "heat": ({}, [{"temp_c": 60.0 + t} for t in range(30)]),
    "throttle": ({}, [{"heat_throttled": flag} for flag in (False, True)]),
    "supply": ({}, [{"undervoltage": flag} for flag in (False, True)]),
    "clock": ({"heat_throttled": None, "temp_c": 75.0}, [{"cpu_freq_fraction": f / 20} for f in range(20, 0, -1)]),
    "battery": ({"discharging": True}, [{"battery_fraction": f / 40} for f in range(40, -1, -1)]),
    "cpu": ({}, [{"foreign_cpu_fraction": f / 40} for f in range(41)]),
    "cpu by pressure": ({"foreign_cpu_fraction": None}, [{"cpu_pressure": f / 40} for f in range(41)]),
    "quota": ({}, [{"cgroup_throttled_fraction": f / 40} for f in range(41)]),
    "memory": ({}, [{"available_memory_bytes": 500 * n} for n in range(20, -1, -1)]),
    "device": ({}, [{"device_state": state} for state in range(4)]),
    "saver": ({}, [{"saving": flag} for flag in (False, True)]),
    "hidden": ({}, [{"hidden": flag} for flag in (False, True)]),
    "latency": ({}, [{"tokens_per_s": t / 2} for t in range(60, 0, -1)]),
    "lifetime": ({"discharging": True}, [{"power_w": w / 2} for w in range(200)]),
    "pace": (
        {"temp_c": None, "foreign_cpu_fraction": None, "cpu_pressure": None},
        [{"tokens_per_s": t / 2} for t in range(60, 0, -1)],
    ),
}
AIMS = {"latency": {"min_tps": 16.0}, "lifetime": {"last_until_s": 1000 + 2 * 3600.0}}


def policy_with(signal: str) -> Policy:
    """The policy "auto", or else the first policy that uses the signal, with the goal that the signal needs."""
    names = sorted(POLICIES, key=lambda name: name != "auto")
    return policy(next(n for n in names if signal.split()[0] in POLICIES[n].bands), **AIMS.get(signal, {}))


def test_every_signal_is_in_the_table() -> None:
    assert {name.split()[0] for name in WORSE} == set(TRIGGERS)


@given(any_policy, any_history)
@settings(max_examples=60, deadline=None)
def test_whatever_is_read_and_whatever_the_clock_does_the_budget_is_within_bounds(
    by: Any, history: list[tuple[Readings, float]]
) -> None:
    low, high = by.bounds
    state = start(by)
    for readings, now in history:
        before = state.clock_s
        state, budget, reason = step(state, readings, now, by)
        assert low <= budget <= high
        assert budget == state.bits
        assert reason
        assert before <= state.clock_s < math.inf
        assert all(math.isfinite(track.value) and math.isfinite(track.slope) for track in state.tracks.values())
        for line in state.learned.token_times.values():
            assert 0.1 <= line.share <= 1.0
            assert 1e-6 <= line.at(1.0) <= 1e3
        heat, watts = state.learned.heat, state.learned.watts
        assert 20 <= heat.tau_s <= 2000
        assert -40 <= heat.settled_c(1.0) <= 300
        assert 0 <= watts.at(1.0, 10.0) <= 2000


def test_two_looks_next_to_no_time_apart() -> None:
    by = policy("auto")
    low, high = by.bounds
    state = start(by)
    for now, throttled in ((0.0, False), (5e-324, True), (1e-323, False), (1.5, True)):
        state, budget, _ = step(state, replace(CALM, heat_throttled=throttled), now, by)
        assert low <= budget <= high
        assert all(math.isfinite(track.slope) for track in state.tracks.values())


@given(any_policy, any_policy, st.lists(any_readings, min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_a_policy_may_be_exchanged_at_any_time(first: Any, second: Any, history: list[Readings]) -> None:
    state = start(first)
    for i, readings in enumerate(history):
        state = step(state, readings, i, first).state
    _, budget, _ = step(state, history[-1], len(history), second)
    assert second.bounds[0] <= budget <= second.bounds[1]


@pytest.mark.parametrize("signal", WORSE)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_worse_reading_never_gives_a_higher_budget(signal: str, data: st.DataObject) -> None:
    """Two steps from the same state after a random history: the worse reading must not give more bits."""
    base, scale = WORSE[signal]
    by = policy_with(signal)
    state: State = start(by)
    steps = st.lists(st.tuples(st.integers(0, len(scale) - 1), st.floats(0.1, 30)), max_size=12)
    now = 1000.0
    for level, elapsed in data.draw(steps):
        now += elapsed
        state = step(state, replace(CALM, **base, **scale[level]), now, by).state
    levels = sorted(data.draw(st.tuples(*[st.integers(0, len(scale) - 1)] * 2)))
    elapsed = data.draw(st.floats(0, 60))
    after = [step(state, replace(CALM, **base, **scale[level]), now + elapsed, by).budget for level in levels]
    assert after[1] <= after[0]


MANY_LEVELS = ("battery", "cpu", "cpu by pressure", "quota")
"""Signals of some forty levels, about a second of a core each."""
LASTING = [
    pytest.param(name, marks=[pytest.mark.heavy] * (name in MANY_LEVELS))
    for name in WORSE
    if name not in ("latency", "lifetime", "pace")
]


@pytest.mark.parametrize("signal", LASTING)
def test_a_lasting_signal_leads_from_the_ceiling_to_the_floor(signal: str) -> None:
    base, scale = WORSE[signal]
    by, budgets = policy_with(signal), []
    for level in scale:
        *_, (_, last) = run(lambda _, level=level: replace(CALM, **base, **level), 60, by)  # type: ignore[misc]
        budgets.append(last.budget)
    assert budgets == sorted(budgets, reverse=True)
    # A wish to save data is half a reason, however long it lasts.
    assert (budgets[0], budgets[-1]) == (8.0, 5.5 if signal == "saver" else 3.0)
    assert last.reason.startswith(signal.split()[0])


def test_without_pressure_the_budget_does_not_change() -> None:
    assert changes(run(lambda _: CALM, 3600, period_s=1)) == []


def test_a_burst_of_load_is_no_reason() -> None:
    assert changes(run(lambda at: replace(CALM, foreign_cpu_fraction=0.5 if at == 10 else 0.0), 60)) == []


def test_a_flapping_load_makes_the_rises_rarer() -> None:
    """30 s of load, then 30 s without: a rise that is too early doubles the next calm time."""
    found = changes(run(lambda at: replace(CALM, foreign_cpu_fraction=0.5 * (at % 60 < 30)), 1800))
    rises = [at for at, bits in found if bits == 8.0]
    assert rises[0] < 60
    assert all(later - earlier > 600 for earlier, later in pairwise(rises))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.heavy) for seed in (1, 2))])
def test_noise_in_a_steady_state_makes_no_more_than_one_change_in_20_s(seed: int) -> None:
    noise = random.Random(seed)

    def noisy(mean: float) -> Callable[[float], Readings]:
        return lambda _: replace(CALM, foreign_cpu_fraction=abs(noise.gauss(mean, 0.04)))

    for mean in (0.08, 0.3):
        found = changes(run(noisy(mean), 900, period_s=1))
        late = [at for at, _ in found if at > 120]
        assert all(b - a >= 20 for a, b in pairwise(late))
        assert len(late) <= 20


def test_a_sensor_that_blinks_is_not_lost() -> None:
    hot = replace(CALM, temp_c=79.0)
    decisions = list(run(lambda at: hot if at % 20 < 1 else replace(hot, temp_c=None), 300))
    assert all(not decision.state.notices for at, decision in decisions)
    assert decisions[-1][1].budget < 8.0


def test_a_sensor_lost_in_mid_run_is_said_once_and_the_budget_falls_back() -> None:
    def heat_dies(now_s: float) -> Readings:
        return replace(CALM, temp_c=81.0 if now_s < 60 or 200 < now_s < 260 else None)

    decisions = list(run(heat_dies, 600))
    notices = [(at, notice) for at, decision in decisions for notice in decision.state.notices]
    assert notices == [(90.0, "heat: no reading for 30 s; it is ignored")]
    budget = {at: decision.budget for at, decision in decisions}
    assert budget[85.0] == 3.0, "its last word counts for a while"
    assert budget[199.0] > 3.0
    assert budget[259.0] == 3.0, "it counts again when it is back"
    assert budget[600.0] == 8.0


def test_unknown_sensors_are_named_once() -> None:
    bare = Readings(0.0, foreign_cpu_fraction=0.0)
    notices = [notice for _, decision in run(lambda _: bare, 60) for notice in decision.state.notices]
    assert notices == ["unknown on this board, and ignored: heat, throttle, supply, clock, battery, quota, memory"]


def test_a_clock_that_jumps_changes_nothing() -> None:
    by = policy()
    state, found = start(by), set()
    for now in (0, 1, 2, 1e9, 1e9 + 1, -5, -4, math.nan, math.inf, 3, 4):
        state, budget, _ = step(state, CALM, now, by)
        found.add(budget)
    assert found == {8.0}


def test_rising_heat_is_seen_coming() -> None:
    """The temperature rises 0.2 C a second: at 75 C the board is 25 s from its limit."""
    found = changes(run(lambda at: replace(CALM, temp_c=min(60 + 0.2 * at, 79.9)), 120))
    at, _ = found[0]
    assert 74 <= 60 + 0.2 * at < 77, "before the band of 3 C begins"


def test_a_board_that_tells_only_when_it_switches_off_is_kept_10_degrees_below() -> None:
    laptop = replace(CALM, throttle_temp_c=None, critical_temp_c=100.0)
    assert changes(run(lambda _: replace(laptop, temp_c=84.0), 60)) == []
    assert changes(run(lambda _: replace(laptop, temp_c=90.0), 60)) == [(1.0, 4.0)]


def test_the_board_slowing_down_is_acted_on_at_once() -> None:
    found = changes(run(lambda at: replace(CALM, heat_throttled=at >= 10, tokens_per_s=10 if at >= 10 else 20), 30))
    assert found == [(11.0, 3.0)]
    assert changes(run(lambda at: replace(CALM, heat_throttled=at >= 10), 30)) == [], "the speed is as before"


def test_after_heat_the_budget_comes_back_in_small_steps() -> None:
    found = changes(run(lambda at: replace(CALM, temp_c=82.0 if at < 30 else 60.0), 300))
    up = [bits for at, bits in found if at > 30]
    assert up == [4.0, 5.0, 6.0, 7.0, 8.0]


def test_a_battery_counts_only_while_it_is_drained() -> None:
    low = replace(CALM, battery_fraction=0.05)
    assert changes(run(lambda _: low, 60)) == []
    assert changes(run(lambda _: replace(low, discharging=True), 60)) == [(1.0, 3.0)]
    assert changes(run(lambda _: replace(CALM, discharging=True), 60)) == []
    assert changes(run(lambda _: replace(CALM, discharging=True), 60, policy("battery"))) == [(1.0, 5.5)]


def tokens_per_s(bits: float) -> float:
    """A model whose token takes 40 ms plus 10 ms for each bit."""
    return 1 / (0.04 + 0.01 * bits)


@pytest.mark.parametrize(("goal", "expected"), [(5.0, {8.0}), (10.0, {5.0, 5.5, 6.0}), (50.0, {3.0})])
def test_the_budget_settles_where_the_speed_is_the_one_asked_for(goal: float, expected: set[float]) -> None:
    by = policy("auto", min_tps=goal)
    state = start(by)
    budgets = []
    for i in range(600):
        state, budget, _ = step(state, replace(CALM, tokens_per_s=tokens_per_s(state.bits)), i / 2, by)
        budgets.append(budget)
    assert set(budgets[-200:]) <= expected
    assert len(set(budgets[-200:])) == 1


def test_a_battery_that_must_last_lowers_the_budget_until_it_does() -> None:
    """40 Wh for 5 hours allow 8 W; this board uses 4 W plus 0.5 W for each bit."""
    by = policy("auto", last_until_s=5 * 3600.0)
    state, left_wh = start(by), 40.0
    powers = []
    for now_s in range(0, 5 * 3600, 5):
        power_w = 5.5 + 0.5 * state.bits
        left_wh -= power_w * 5 / 3600
        readings = replace(
            CALM, discharging=True, battery_fraction=left_wh / 40, battery_energy_wh=left_wh, power_w=power_w
        )
        state, _, _ = step(state, readings, now_s, by)
        powers.append(power_w)
    assert powers[0] == 9.5
    assert left_wh > 0
    assert powers[360] <= 8.0


def test_weights_that_do_not_fit_in_memory_are_not_chosen() -> None:
    by = replace(policy(), bytes_at=((3.0, 300), (4.0, 400), (6.0, 600), (8.0, 800)))
    found = changes(run(lambda _: replace(CALM, available_memory_bytes=650), 30, by))
    assert found == [(1.0, 6.0)]


def test_a_goal_of_speed_needs_no_sensors() -> None:
    bare = Readings(0.0)
    by = policy("auto", min_tps=10)
    state = start(by)
    for i in range(200):
        state, budget, reason = step(state, replace(bare, tokens_per_s=5.0), i / 2, by)
    assert budget == 3.0
    assert reason == "latency: 5.0 of 10.0 tokens/s: 3 bits"


def test_where_nothing_can_be_sensed_lost_speed_is_the_signal() -> None:
    found = changes(run(lambda at: Readings(0.0, tokens_per_s=20.0 if at < 30 else 6.0), 60))
    assert found
    assert found[0][0] > 30
    assert found[-1][1] < 5.0
    seen = replace(CALM, tokens_per_s=6.0)
    assert changes(run(lambda at: replace(seen, tokens_per_s=20.0 if at < 30 else 6.0), 60)) == []


def test_fixed_is_fixed() -> None:
    trouble = replace(CALM, temp_c=99.0, heat_throttled=True, foreign_cpu_fraction=1.0)
    assert {d.budget for _, d in run(lambda _: trouble, 60, policy("fixed", ceiling_bits=5.0))} == {5.0}
