"""The ladder: threads first, then pacing where a reader is slower than the model, then bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from controlled import CALM, policy
from test_governor import Board, Clock, StandIn, eventually, looks

from mbq_runtime.control.events import Event
from mbq_runtime.control.governor import Governor
from mbq_runtime.control.ladder import RUNGS, Ladder, climb
from mbq_runtime.control.policy import POLICIES
from mbq_runtime.control.threads import Threads
from mbq_runtime.errors import UsageError
from mbq_runtime.simulate.boards import BOARDS
from mbq_runtime.simulate.closed_loop import Follower, contenders, drive
from mbq_runtime.simulate.model import SMOLLM2_135M, USUAL

HOT = replace(CALM, temp_c=79.5)


def test_what_costs_quality_comes_last() -> None:
    assert [rung.name for rung in RUNGS] == ["threads", "speculation", "pacing", "bits"]


def test_tokens_are_guessed_before_bits_are_given() -> None:
    """From the first sign of a load that lasts, until there has been none for 20 s."""
    by, load = policy(speculates=True), replace(CALM, foreign_cpu_fraction=0.6, tokens_per_s=5.0)
    ladder, guessed_s, fell_s = Ladder.of(by, Threads.of(4, 4)), None, None
    for half in range(20):
        look = climb(ladder, load if half >= 4 else replace(CALM, tokens_per_s=10.0), half / 2, by)
        ladder = look.ladder
        if ladder.speculates and guessed_s is None:
            guessed_s = half / 2
            assert look.said[-1].startswith("speculation: tokens are guessed before bits are given (cpu")
        if ladder.bits.bits < by.bounds[1] and fell_s is None:
            fell_s = half / 2
    assert guessed_s is not None
    assert fell_s is not None
    assert 2.0 <= guessed_s < fell_s
    said = []
    for second in range(10, 120):
        look = climb(ladder, CALM, float(second), by)
        said += [text for text in look.said if text.startswith("speculation")]
        if look.ladder.bits.bits < by.bounds[1]:
            assert look.ladder.speculates  # as long as bits are given
        ladder = look.ladder
    assert said == ["speculation: no longer needed"]
    assert not ladder.speculates


def test_the_speed_of_guessed_tokens_is_not_learned() -> None:
    quiet = replace(CALM, foreign_cpu_fraction=0.0, tokens_per_s=20.0, decode_bits=8.0, decode_threads=4)
    for speculates in (False, True):
        by = policy(speculates=True)
        ladder = replace(Ladder.of(by, Threads.of(4, 4)), speculates=speculates)
        for half in range(30):
            ladder = climb(ladder, quiet, half / 2, by).ladder
        assert ladder.bits.learned.token_time(4).is_known is not speculates


class Guessing(StandIn):
    """An engine that can guess tokens, or not take guesses back."""

    def __init__(self, able: bool = True) -> None:
        super().__init__()
        self._able, self._mode = able, "off"

    @property
    def speculate(self) -> str:
        return self._mode

    @speculate.setter
    def speculate(self, mode: str) -> None:
        self._mode = mode if self._able else "off"


@pytest.mark.parametrize("able", [True, False])
def test_a_governor_turns_speculation_on(able: bool) -> None:
    engine, board, clock, events = Guessing(able), Board(), Clock(), list[Event]()
    governor = Governor(engine, board, POLICIES["auto"], events.append, clock=clock)
    looks(governor, clock, 4)
    assert engine.speculate == "off"
    board.readings = replace(CALM, heat_throttled=True)
    looks(governor, clock, 3)
    assert engine.speculate == ("auto" if able else "off")
    assert governor.policy.speculates is able
    kinds = [event.reason.partition(":")[0] for event in events]
    assert kinds == (["speculation", "throttle"] if able else ["throttle"])


def test_speculation_is_off_again_after_the_governor() -> None:
    engine = Guessing()
    with Governor(engine, Board(replace(CALM, heat_throttled=True)), POLICIES["auto"]):
        assert eventually(lambda: engine.speculate == "auto")
    assert engine.speculate == "off"


@pytest.mark.parametrize(("mode", "allowed"), [("on", True), ("off", False)])
def test_a_mode_that_was_chosen_stays(mode: str, allowed: bool) -> None:
    engine, clock = Guessing(), Clock()
    engine.speculate = mode
    board = Board(replace(CALM, heat_throttled=True))
    looks(Governor(engine, board, POLICIES["auto"], clock=clock, speculates=allowed), clock, 5)
    assert engine.speculate == mode


def test_every_rung_says_what_it_does() -> None:
    by = policy(reader_tps=10.0)
    ladder, said = Ladder.of(by, Threads.of(4, 4)), []
    for second in range(5):
        look = climb(ladder, replace(HOT, foreign_cpu_fraction=0.5), float(second), by)
        ladder = look.ladder
        said += look.said
    assert said == [
        "threads: 4 to 2, 2.0 of 4 processors are free for this program",
        "pacing: 10 tokens/s, without a pause the board would get too warm",
    ]
    for second in range(5, 60):
        look = climb(ladder, CALM, float(second), by)
        ladder = look.ladder
        said += look.said
    assert [step.split(",")[0] for step in said[2:]] == [
        "threads: 2 to 3",
        "threads: 3 to 4",
        "pacing: no longer needed",
    ]


@pytest.mark.parametrize(("reader_tps", "keeps"), [(None, False), (12.0, True)])
def test_a_reply_at_reading_speed_keeps_a_bare_board_cool_at_full_quality(
    reader_tps: float | None, keeps: bool
) -> None:
    ((_, auto),) = contenders(["auto"], 4.0, 8.0)
    board, weights = BOARDS["pi5-bare"], SMOLLM2_135M
    run = drive(board, weights, "auto", Follower(replace(auto, reader_tps=reader_tps), board, weights), [USUAL] * 700)
    assert (not any(sample.above for sample in run.samples)) is keeps
    if keeps:
        assert {sample.bits for sample in run.samples} == {8.0}
        assert {round(sample.tokens_per_s or 0) for sample in run.samples[:100]} == {41}, "not before it is needed"


def test_a_governor_waits_between_tokens_while_a_reply_is_paced(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("mbq_runtime.control.governor.time.sleep", slept.append)
    board, clock, events = Board(), Clock(), list[Event]()
    governor = Governor(StandIn(), board, replace(POLICIES["auto"], reader_tps=10.0), events.append, clock=clock)
    looks(governor, clock, 2)
    governor._between_tokens(0.02, 8.0)
    assert slept == []
    board.readings = HOT
    looks(governor, clock, 40)
    governor._between_tokens(0.02, 8.0)
    governor._between_tokens(0.30, 8.0)
    assert slept == pytest.approx([0.08, 0.0])
    assert any(event.reason.startswith("pacing") and not event.is_change for event in events)


def test_fixed_is_never_paced() -> None:
    by = policy("fixed", reader_tps=10.0)
    assert not climb(Ladder.of(by, Threads.of(4, 4)), replace(HOT, heat_throttled=True), 0.0, by).ladder.paced
    with pytest.raises(UsageError, match="reader_tps 0: needed a number above 0"):
        policy(reader_tps=0)
