"""The bounds of an engine under a governor, and the figures of a reply."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from controlled import CALM
from test_governor import AUTO, Board, Clock
from tiny_bundle import REPLY, ids

from mbq_runtime import Engine
from mbq_runtime.control.bounds import BoundedEngine
from mbq_runtime.control.governor import Governor
from mbq_runtime.control.metered_reply import MeteredReply
from mbq_runtime.errors import UsageError


@pytest.mark.parametrize(
    ("floor", "ceiling", "wish", "used"),
    [(None, None, 5.0, 5.0), (6.0, None, 5.0, 6.0), (4.0, None, 5.0, 5.0), (None, 4.0, 5.0, 4.0), (4.5, 4.5, 5.0, 4.5)],
)
def test_bounds_hold_the_wish_and_give_it_back(
    engine: Engine, floor: float | None, ceiling: float | None, wish: float, used: float
) -> None:
    bounded = BoundedEngine(engine)
    bounded.avg_bits = wish
    with bounded.within_bounds(floor, ceiling):
        assert engine.avg_bits == bounded.avg_bits == used
        assert bounded.is_limiting == (used != wish)
    assert engine.avg_bits == wish
    assert not bounded.is_limiting


def test_a_wish_made_under_bounds_counts_when_they_are_lifted(engine: Engine) -> None:
    bounded = BoundedEngine(engine)
    bounded.set_bounds(7.0, None)
    with bounded.within_bounds(6.0, 6.0):
        bounded.avg_bits = 3.0
        assert engine.avg_bits == 6.0
    assert engine.avg_bits == 7.0  # the bounds of before are back
    bounded.set_bounds(None, None)
    assert engine.avg_bits == 3.0


def test_a_wish_the_single_precision_cannot_hold_is_not_bitten(engine: Engine) -> None:
    bounded = BoundedEngine(engine)
    bounded.avg_bits = 4.1
    assert engine.avg_bits == 4.1
    assert not bounded.is_limiting


def test_a_wish_outside_the_bundle_is_refused(engine: Engine) -> None:
    bounded = BoundedEngine(engine)
    with pytest.raises(UsageError, match="takes a number from 3 to 8"):
        bounded.avg_bits = 2.0
    assert engine.avg_bits == 8.0


def test_many_threads_leave_it_whole(engine: Engine) -> None:
    bounded = BoundedEngine(engine)

    def wish(value: float) -> None:
        for _ in range(2000):
            bounded.avg_bits = value

    threads = [threading.Thread(target=wish, args=(3.0 + i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        with bounded.within_bounds(7.0, 7.5):
            assert engine.avg_bits == 7.0
    assert engine.avg_bits == bounded._wish
    assert bounded._wish in (3.0, 4.0, 5.0, 6.0)


def test_the_governor_hears_tokens_through_it_and_learns_nothing_from_bounded_ones(engine: Engine) -> None:
    clock = Clock()
    bounded = BoundedEngine(engine)
    governor = Governor(bounded, Board(CALM), AUTO, clock=clock)
    bounded.add_listener(governor.observe)
    governor.tick()
    with bounded.within_bounds(4.0, 4.0):
        engine.generate("xA", max_tokens=40, chat=False).text()
        clock.now_s += 0.5
        status = governor.tick()
    bounded.remove_listener(governor.observe)
    assert status.tokens_per_s is not None
    assert status.avg_bits_used == pytest.approx(4.07, abs=0.01)
    assert engine.avg_bits == 8.0  # four bits too few for 39 tokens would have been made up for


def test_follow_tells_bits_and_tokens_of_each_piece(engine: Engine) -> None:
    governor: Any = SimpleNamespace(status=lambda: SimpleNamespace(readings=CALM))
    reply = engine.generate("hello", avg_bits=5.0)
    pieces = list(MeteredReply(reply, governor))
    assert "".join(piece.text for piece in pieces) == REPLY
    assert [piece.tokens for piece in pieces] == [2 if piece.text == "ö" else 1 for piece in pieces]
    assert pieces[1].bits == pytest.approx(5.0 + ids("H")[0] / 1000, abs=1e-6)


@pytest.mark.parametrize(("powers", "energy_j"), [([2.0] * 9, 16.0), ([2.0, None, 2.0], None), ([4.0, 1.0], 11.0)])
def test_follow_counts_energy_of_the_engine_s_time_only(powers: list[float | None], energy_j: float | None) -> None:
    """The clock moves 1 s at each call; the reader takes 100 s between two pieces."""
    now_s, at = 0.0, iter([*powers, *[powers[-1]] * 20])

    def clock() -> float:
        nonlocal now_s
        now_s += 1.0
        return now_s

    governor: Any = SimpleNamespace(status=lambda: SimpleNamespace(readings=SimpleNamespace(power_w=next(at))))
    stats = SimpleNamespace(bits=(4.0,) * 7)

    class Reply:
        def __init__(self) -> None:
            self.stats = stats

        def __iter__(self) -> Any:
            return iter("abcdefg")

    reply: Any = Reply()
    metered = MeteredReply(reply, governor, clock)
    for _ in metered:
        now_s += 100.0
    assert metered.energy_j == energy_j
