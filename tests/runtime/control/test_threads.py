from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

from controlled import CALM, policy, run
from hypothesis import given
from hypothesis import strategies as st

from mbq_runtime.control.threads import Threads
from mbq_runtime.sensing.readings import Readings

maybe = st.none() | st.floats()


def counts(left_at: Callable[[float], float | None], seconds: float, most: int = 2, cpus: int = 2) -> list[int]:
    """The number of threads every 0.5 s, for given free processors."""
    threads, found = Threads.of(most, cpus), []
    for i in range(round(2 * seconds)):
        left = left_at(i / 2)
        foreign = None if left is None else 1 - left / cpus
        threads = threads.after(Readings(0.0, foreign_cpu_fraction=foreign, available_cpus=cpus), 0.5)
        found.append(threads.count)
    return found


@given(st.lists(st.tuples(maybe, maybe, st.floats(0, 1e6)), max_size=30), st.integers(1, 64), st.integers(1, 64))
def test_always_one_thread_and_never_more_than_the_engine_has(
    history: list[tuple[float | None, float | None, float]], most: int, cpus: int
) -> None:
    threads = Threads.of(most, cpus)
    for foreign, available, elapsed_s in history:
        readings = Readings(0.0, foreign_cpu_fraction=foreign, available_cpus=available)
        threads = threads.after(readings, elapsed_s)
        assert 1 <= threads.count <= most
        assert threads.describe(most)


def test_an_idle_machine_and_an_unknown_one_keep_all_threads() -> None:
    assert set(counts(lambda _: 2.0, 60)) == {2}
    assert set(counts(lambda _: None, 60)) == {2}


def test_a_busy_core_is_left_alone_within_two_seconds_and_taken_back_after_a_while() -> None:
    found = counts(lambda at: 1.0 if 10 <= at < 60 else 2.0, 90)
    assert set(found[:20]) == {2}
    assert set(found[24:120]) == {1}
    assert found[2 * 62] == 1
    assert set(found[2 * 66 :]) == {2}


def test_threads_beyond_the_processors_that_are_free_are_the_only_ones_given_up() -> None:
    assert counts(lambda _: 3.0, 30, most=4, cpus=4)[-1] == 3
    assert counts(lambda _: 4.0, 30, most=2, cpus=8)[-1] == 2  # four programs on eight processors take none of two
    assert counts(lambda _: 0.0, 30, most=4, cpus=4)[-1] == 1


def test_load_near_the_edge_does_not_make_threads_come_and_go() -> None:
    noise = random.Random(0)
    for mean in (1.2, 1.4, 1.5, 1.6, 1.8):
        found = counts(lambda _, m=mean: noise.gauss(m, 0.1), 1800)  # type: ignore[misc]
        assert sum(a != b for a, b in pairwise(found)) <= 8


def test_a_limit_counts_as_processors_that_are_gone_and_keeps_pressing_on_bits() -> None:
    """With one thread a limit of one processor no longer stops the engine, but the limit is still there."""
    limited = replace(CALM, available_cpus=1.0, cgroup_throttled_fraction=0.0)
    threads = Threads.of(4, 4)
    for _ in range(20):
        threads = threads.after(limited, 0.5)
    assert threads.count == 1
    by = replace(policy("auto"), threads=4)
    assert [decision for _, decision in run(lambda _: limited, 60, by)][-1].budget == 3.0
    fitting = replace(by, threads=1)
    assert [decision for _, decision in run(lambda _: limited, 60, fitting)][-1].budget == 8.0


def test_nonsense_is_not_known() -> None:
    assert Threads.of(4, 4).after(Readings(0.0, foreign_cpu_fraction=math.nan), 0.5).left_cpus is None
