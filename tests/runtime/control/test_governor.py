from __future__ import annotations

import json
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from controlled import CALM, MANIFEST
from tiny_bundle import CIRCLE, ids

from mbq_runtime import Engine
from mbq_runtime.control.budget_trim import BudgetTrim
from mbq_runtime.control.energy import Energy, describe
from mbq_runtime.control.events import Event, JsonLines
from mbq_runtime.control.governor import Governor, Status
from mbq_runtime.control.policy import POLICIES
from mbq_runtime.engine import Session
from mbq_runtime.errors import UsageError
from mbq_runtime.sensing.readings import Readings

AUTO = POLICIES["auto"]


class StandIn:
    """An engine without a model."""

    manifest = MANIFEST

    def __init__(self) -> None:
        self.avg_bits = 8.0


class Board:
    """Sensors that give the readings of the test."""

    def __init__(self, readings: Readings = CALM) -> None:
        self.readings = readings

    def read(self) -> Readings:
        return self.readings


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def looks(governor: Governor, clock: Clock, seconds: float) -> Status:
    """Advance the clock, with two looks a second."""
    for _ in range(round(2 * seconds)):
        clock.now_s += 0.5
        status = governor.tick()
    return status


def eventually(holds: Callable[[], bool], within_s: float = 20.0) -> bool:
    end = time.monotonic() + within_s
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


def test_every_change_is_an_event_with_its_reason() -> None:
    engine, board, clock, events = StandIn(), Board(), Clock(), list[Event]()
    governor = Governor(engine, board, AUTO, events.append, clock=clock)
    assert looks(governor, clock, 10).avg_bits == 8.0
    board.readings = replace(CALM, heat_throttled=True)
    status = looks(governor, clock, 3)
    assert engine.avg_bits == status.avg_bits == 3.0
    assert status.reason == "throttle: heat slows the board now"
    assert [(event.old, event.new, event.reason) for event in events] == [(8.0, 3.0, status.reason)]
    assert events[0].readings.heat_throttled is True
    assert events[0].is_change


def test_a_word_about_the_sensors_is_an_event_without_a_change() -> None:
    clock, events = Clock(), list[Event]()
    looks(Governor(StandIn(), Board(Readings(0.0)), AUTO, events.append, clock=clock), clock, 30)
    (event,) = events
    assert not event.is_change
    assert event.reason.startswith("unknown on this board")


def test_speed_bits_and_energy_of_late() -> None:
    board, clock = Board(replace(CALM, power_w=6.0)), Clock()
    governor = Governor(StandIn(), board, AUTO, clock=clock)
    assert looks(governor, clock, 0.5).tokens_per_s is None
    for _ in range(5):
        governor.observe(0.1, 7.0)
    status = looks(governor, clock, 0.5)
    assert status.tokens_per_s == pytest.approx(10.0)
    assert status.readings.tokens_per_s == pytest.approx(10.0)
    assert status.avg_bits_used == 7.0
    assert status.energy_j_per_token == pytest.approx(0.6)
    assert looks(governor, clock, 1.0).tokens_per_s == pytest.approx(10.0)
    assert looks(governor, clock, 5.0).tokens_per_s is None, "idle"


def test_energy_is_unknown_without_a_power_sensor_and_counts_known_stretches_only() -> None:
    assert Energy().joules_per_token is None
    assert describe(None) == "unknown (no power sensor)"
    assert describe(0.4567) == "0.457 J/token"
    energy = Energy().add(5.0, 2.0, 10).add(None, 100.0, 7).add(3.0, 1.0, 3).add(9.0, 1.0, 0)
    assert (energy.joules, energy.tokens) == (13.0, 13)
    assert energy.joules_per_token == 1.0


@pytest.mark.parametrize("offset", [0.3, -0.3])
def test_a_router_that_misses_the_budget_is_corrected(offset: float) -> None:
    engine, clock = StandIn(), Clock()
    governor = Governor(engine, Board(), replace(AUTO, ceiling_bits=5.0), clock=clock)
    used = 0.0
    for _ in range(100):
        used = engine.avg_bits + offset
        for _ in range(20):
            governor.observe(0.02, used)
        looks(governor, clock, 0.5)
    assert used == pytest.approx(5.0, abs=0.02)


def test_a_fixed_budget_is_not_corrected() -> None:
    engine, clock = StandIn(), Clock()
    governor = Governor(engine, Board(), replace(POLICIES["fixed"], ceiling_bits=5.0), clock=clock)
    for _ in range(100):
        governor.observe(0.02, 4.5)
    looks(governor, clock, 5)
    assert engine.avg_bits == 5.0


def test_a_correction_stays_within_half_a_bit_and_the_bounds() -> None:
    trim = BudgetTrim(5.0)
    for _ in range(1000):
        trim = trim.after(3.0)
    assert trim.request(3.0, 8.0) == 5.5
    assert trim.request(3.0, 5.2) == 5.2
    assert trim.at(5.0) is trim
    assert trim.at(6.0) == BudgetTrim(6.0)


def test_a_policy_can_be_replaced() -> None:
    engine, clock = StandIn(), Clock()
    governor = Governor(engine, Board(), AUTO, clock=clock)
    governor.policy = replace(POLICIES["fixed"], ceiling_bits=4.0)
    assert governor.policy.bounds == (3.0, 4.0)
    assert looks(governor, clock, 0.5).avg_bits == engine.avg_bits == 4.0
    with pytest.raises(UsageError, match="takes a number from 3 to 8"):
        governor.policy = replace(AUTO, floor_bits=1.0)


def test_the_thread_follows_the_board_and_ends() -> None:
    engine, board = StandIn(), Board()
    with Governor(engine, board, AUTO) as governor:
        assert engine.avg_bits == 8.0
        board.readings = replace(CALM, heat_throttled=True)
        assert eventually(lambda: engine.avg_bits == 3.0)
        assert "mbq-governor" in [thread.name for thread in threading.enumerate()]
    assert "mbq-governor" not in [thread.name for thread in threading.enumerate()]
    assert governor.status().avg_bits == 3.0


def test_a_listener_that_fails_does_not_end_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    engine, board = StandIn(), Board(replace(CALM, foreign_cpu_fraction=1.0))

    def fail(event: Event) -> None:
        raise ValueError("the listener's own mistake")

    with Governor(engine, board, AUTO, fail) as governor:
        assert eventually(lambda: "failed" in governor.status().reason)
        board.readings = CALM
        assert eventually(lambda: "failed" not in governor.status().reason)
    assert "the listener's own mistake" in caplog.text


def test_a_file_of_events(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with JsonLines(path) as lines:
        lines.write(Event(1.0, 8.0, 4.5, "heat: 79.0 C", Readings(5.0, temp_c=79.0)).as_dict())
        lines.write({"a": "ö"})
    first, second = path.read_text().splitlines()
    assert json.loads(first) == {
        "time_s": 1.0, "old": 8.0, "new": 4.5, "reason": "heat: 79.0 C", "readings": {"time_s": 5.0, "temp_c": 79.0},
    }  # fmt: skip
    assert json.loads(second) == {"a": "ö"}
    with pytest.raises(UsageError, match=r"the folder .*none does not exist; make it, or choose another file"):
        JsonLines(tmp_path / "none" / "events.jsonl")


def test_a_full_disk_ends_the_file_not_the_reply(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(), JsonLines("/dev/full") as lines:
        warnings.simplefilter("error", ResourceWarning)  # a file that nobody closed
        lines.write({"a": 1})
        lines.write({"a": 2})
    assert caplog.text.count("no longer written") == 1


def test_with_the_real_engine(engine: Engine) -> None:
    """The engine reports its tokens by itself, and a change applies to a reply in progress."""
    board = Board()
    with Governor(engine, board, AUTO, speculates=False) as governor:  # a pass is one token
        reply = engine.generate(CIRCLE, max_tokens=80, chat=False)
        next(reply)
        board.readings = replace(CALM, heat_throttled=True)
        assert eventually(lambda: engine.avg_bits == 3.0)
        reply.text()
        assert eventually(lambda: governor.status().tokens_per_s is not None)
    assert reply.stats.bits[0] > 7
    assert reply.stats.bits[-1] == pytest.approx(3.0 + reply.stats.tokens[-2] / 1000, abs=1e-5)


def test_a_listener_of_the_program_stays_beside_a_governor(engine: Engine) -> None:
    heard: list[float] = []

    def listener(seconds: float, bits: float) -> None:
        heard.append(bits)

    engine.add_listener(listener)
    try:
        with Governor(engine, Board(CALM), AUTO) as governor:
            engine.generate(CIRCLE, max_tokens=5, chat=False).text()
            assert governor._tokens or governor.status().tokens_per_s is not None  # both were called
            assert len(heard) == 4  # all but the first
        engine.generate(CIRCLE, max_tokens=5, chat=False).text()
        assert len(heard) == 8
        assert not governor._tokens  # a governor that has ended hears nothing
    finally:
        engine.remove_listener(listener)
    engine.generate(CIRCLE, max_tokens=5, chat=False).text()
    assert len(heard) == 8


BUDGETS = [float(np.float32(bits)) for bits in (3.0, 3.7, 4.1, 5.3, 6.9, 8.0)]


def hammer(set_bits: Callable[[float], None], generate: Callable[[], None]) -> int:
    """Set 1,000 budgets from another thread while ``generate`` runs repeatedly.  Returns the number of budgets set."""
    done = threading.Event()
    count = 0

    def change() -> None:
        nonlocal count
        for i in range(1000):
            set_bits(BUDGETS[i % len(BUDGETS)])
            count += 1
            time.sleep(0.0002)  # about a pass of the tiny model
        done.set()

    thread = threading.Thread(target=change)
    thread.start()
    while not done.is_set():
        generate()
    thread.join()
    return count


def test_a_thousand_changes_during_generation_tear_nothing(engine: Engine) -> None:
    seen: set[float] = set()

    def generate() -> None:
        reply = engine.generate(CIRCLE, max_tokens=80, chat=False)
        reply.text()
        # The pass that gave token i read token i - 1: the tiny model adds a thousandth of its id.
        inputs = reply.stats.tokens[:-1]
        seen.update(round(bits - token / 1000, 3) for bits, token in zip(reply.stats.bits[1:], inputs, strict=True))

    assert hammer(lambda bits: setattr(engine, "avg_bits", bits), generate) == 1000
    assert seen <= {round(bits, 3) for bits in BUDGETS}
    assert len(seen) > 1


def test_a_thousand_changes_under_plain_onnxruntime(bundle: Path) -> None:
    session = Session(bundle, threads=1)
    budget, seen = [8.0], set[float]()
    tokens = ids(CIRCLE)

    def set_bits(bits: float) -> None:
        budget[0] = bits

    def generate() -> None:
        seen.add(round(session.run(tokens, budget[0]).avg_bits_used - sum(tokens) / len(tokens) / 1000, 3))

    assert hammer(set_bits, generate) == 1000
    assert seen <= {round(bits, 3) for bits in BUDGETS}
    assert len(seen) > 1


class Threading(StandIn):
    """An engine with threads.  able: whether their number can be changed."""

    def __init__(self, able: bool = True) -> None:
        super().__init__()
        self._threads, self._able = 2, able

    @property
    def threads(self) -> int:
        return self._threads

    @threads.setter
    def threads(self, count: int) -> None:
        if self._able:
            self._threads = count


BUSY = replace(CALM, foreign_cpu_fraction=0.5, available_cpus=2.0)
IDLE = replace(CALM, foreign_cpu_fraction=0.0, available_cpus=2.0)


def test_threads_follow_the_load_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    engine, board, clock, events = Threading(), Board(IDLE), Clock(), list[Event]()
    governor = Governor(engine, board, AUTO, events.append, clock=clock)
    looks(governor, clock, 5)
    assert engine.threads == 2
    board.readings = BUSY
    looks(governor, clock, 4)
    assert engine.threads == 1
    said = [event.reason for event in events if not event.is_change]
    assert said == ["threads: 2 to 1, 1.4 of 2 processors are free for this program"]
    board.readings = IDLE
    looks(governor, clock, 15)
    assert engine.threads == 2
    with Governor(engine, board, AUTO, clock=clock) as governor:
        engine.threads = 1
    assert engine.threads == 2


def test_a_fixed_policy_and_an_engine_that_cannot_keep_their_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    for able, by in ((True, POLICIES["fixed"]), (False, AUTO)):
        engine, clock, events = Threading(able), Clock(), list[Event]()
        looks(Governor(engine, Board(BUSY), by, events.append, clock=clock), clock, 20)
        assert engine.threads == 2
        assert not any("threads" in event.reason for event in events)
