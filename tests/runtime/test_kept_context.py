"""A session reads only what is new in a prompt, and its replies are those without a session."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_bundle import CIRCLE, CONTEXT, ids

from mbq_runtime import BundleError, Engine, UsageError
from mbq_runtime.engine import KeptContext, genai, kept_context
from mbq_runtime.engine.kept_context import REREAD_BITS


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The tokens of every pass, in order."""
    seen: list[int] = []
    append = genai._Context.append

    def noted(run: genai._Context, tokens: NDArray[np.int32], rows: int) -> None:
        seen.extend(tokens.tolist())
        append(run, tokens, rows)

    monkeypatch.setattr(genai._Context, "append", noted)
    return seen


def test_a_conversation_reads_each_token_once(engine: Engine, read: list[int]) -> None:
    session, talk = engine.session(), ids("xA")
    for turn in range(4):
        read.clear()
        reply = engine.generate(talk, max_tokens=5, session=session)
        text = reply.text()
        assert text == engine.generate(talk, max_tokens=5).text()
        stats = reply.stats
        # The last token of a reply has no pass until the next prompt has it.
        new = 2 if turn == 0 else 1 + 3
        assert stats.cached_tokens == len(talk) - new
        assert read[: new + 4] == [*talk[-new:], *stats.tokens[:-1]]
        assert session.tokens == [*talk, *stats.tokens[:-1]]
        talk = [*talk, *stats.tokens, *ids("yzA")]


def test_a_prompt_that_differs_in_the_middle(engine: Engine, read: list[int]) -> None:
    session = engine.session()
    engine.generate(ids("abcdefgh"), max_tokens=3, session=session).text()
    read.clear()
    reply = engine.generate(ids("abcdxyA"), max_tokens=3, session=session)
    assert reply.text() == "BCD"
    assert reply.stats.cached_tokens == 4
    assert read == [*ids("xyA"), *ids("BC")]
    assert session.tokens == ids("abcdxyABC")


def test_the_same_prompt_again_reads_its_last_token(engine: Engine, read: list[int]) -> None:
    session = engine.session()
    texts = []
    for _ in range(2):
        reply = engine.generate(ids("xyzA"), max_tokens=3, session=session)
        texts.append(reply.text())
    assert texts == ["BCD", "BCD"]
    assert reply.stats.cached_tokens == 3
    assert len(read) == 4 + 2 + 1 + 2
    shorter = engine.generate(ids("xy"), max_tokens=1, session=session)
    shorter.text()
    assert shorter.stats.cached_tokens == 1
    assert session.tokens == ids("xy")


def test_a_prompt_read_at_fewer_bits_is_read_again(engine: Engine, read: list[int]) -> None:
    session, prompt = engine.session(), ids("uvwxyzA")
    engine.generate(prompt, max_tokens=1, session=session, avg_bits=5.0).text()
    for bits, cached in ((5.0 + REREAD_BITS, 6), (5.01 + REREAD_BITS, 0), (3.0, 6), (7.0, 6)):
        reply = engine.generate(prompt, max_tokens=1, session=session, avg_bits=bits)
        reply.text()
        assert reply.stats.cached_tokens == cached, bits


def test_only_what_follows_the_first_token_of_fewer_bits_is_read_again(engine: Engine) -> None:
    session = engine.session()
    engine.generate(ids("abcd"), max_tokens=1, session=session, avg_bits=8.0).text()
    engine.generate(ids("abcdefgh"), max_tokens=1, session=session, avg_bits=4.0).text()
    reply = engine.generate(ids("abcdefgh"), max_tokens=1, session=session, avg_bits=8.0)
    reply.text()
    assert reply.stats.cached_tokens == 4


def test_a_stopped_prompt_keeps_what_was_read(engine: Engine) -> None:
    session = engine.session()
    reply = engine.generate("x" * 60, max_tokens=5, chat=False, session=session)
    session_append = session.append

    def stop_soon(tokens: NDArray[np.int32]) -> None:
        session_append(tokens)
        if len(session) >= 16:
            reply.stop()

    session.append = stop_soon  # type: ignore[method-assign]
    assert reply.text() == ""
    assert len(session) == 16
    session.append = session_append  # type: ignore[method-assign]
    again = engine.generate("x" * 60, max_tokens=5, chat=False, session=session)
    again.text()
    assert again.stats.cached_tokens == 16


def test_a_failed_pass_leaves_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    session = engine.session()
    engine.generate(ids("xyzA"), max_tokens=2, session=session).text()

    def broken(run: genai._Context, tokens: NDArray[np.int32], rows: int) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(genai._Context, "append", broken)
        with pytest.raises(BundleError, match="generation failed: no memory"):
            engine.generate(ids("xyzAB"), max_tokens=2, session=session).text()
    assert session.tokens == []
    assert engine.generate(ids("xyzA"), max_tokens=2, session=session).text() == "BC"


def test_sessions_do_not_mix(engine: Engine) -> None:
    sessions = [engine.session() for _ in range(3)]
    talks = [ids(start) for start in ("xA", "yzA", "wC")]
    for _ in range(3):
        for at, session in enumerate(sessions):
            reply = engine.generate(talks[at], max_tokens=4, session=session)
            assert reply.text() == engine.generate(talks[at], max_tokens=4).text()
            talks[at] += reply.stats.tokens
    assert all(talk[: len(session)] == session.tokens for talk, session in zip(talks, sessions, strict=True))
    assert sessions[0].kept_bytes == CONTEXT * 2 * 2 * 16 * 4  # keys and values, two heads of 16, float32


def test_a_session_to_the_end_of_the_context(engine: Engine) -> None:
    session = engine.session()
    for _ in range(2):
        reply = engine.generate(ids("A" * (CONTEXT - 3)), max_tokens=1000, session=session)
        assert reply.text() == "BCD"
        assert reply.stats.finish_reason == "length"


def test_a_full_session_gets_twice_the_room(engine: Engine, read: list[int]) -> None:
    session = KeptContext(engine._backend, engine._budget, CONTEXT, 8, first=16)
    token_bytes = engine._backend.token_bytes
    engine.generate(ids("xA"), max_tokens=4, session=session).text()
    assert session.kept_bytes == 16 * token_bytes
    # The prompt needs more room: it is read as a whole, like a new one.
    prompt = ids("xA" + CIRCLE * 2)
    reply = engine.generate(prompt, max_tokens=8, session=session)
    assert reply.text() == (CIRCLE * 2)[:8]
    assert (reply.stats.cached_tokens, session.kept_bytes) == (0, 32 * token_bytes)
    read.clear()
    reply = engine.generate([*prompt, *reply.stats.tokens], max_tokens=4, session=session)
    reply.text()
    assert reply.stats.cached_tokens == len(prompt) + 7
    assert len(read) == 1 + 3


def test_a_reply_longer_than_its_room_goes_on(engine: Engine, read: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_context, "_REPLY_TOKENS", 4)
    session = KeptContext(engine._backend, engine._budget, CONTEXT, 8, first=16)
    reply = engine.generate(ids("xyzA"), max_tokens=60, session=session)
    text = reply.text()
    assert text == (CIRCLE * 9)[1:61]
    assert reply.stats.finish_reason == "length"
    assert session.tokens == [*ids("xyzA"), *reply.stats.tokens[:-1]]
    assert len(read) == len(session) + 16 + 32  # it was full twice
    assert session.kept_bytes == 64 * engine._backend.token_bytes


def test_a_cleared_session_is_empty(engine: Engine) -> None:
    session = engine.session()
    engine.generate(ids("xA"), max_tokens=2, session=session).text()
    session.clear()
    assert (len(session), session.kept_bytes, session.tokens) == (0, 0, [])
    assert engine.generate(ids("xA"), max_tokens=2, session=session).stats.cached_tokens == 0


def test_an_engine_that_cannot_keep_a_session_in_a_file_says_so(engine: Engine, tmp_path: Path) -> None:
    words = "engine onnx cannot load keys and values from a file; export the bundle with --engine tvm"
    with pytest.raises(UsageError, match=words):
        engine.load_session(tmp_path / "file")
    with pytest.raises(UsageError, match=words):
        engine.save_session(engine.session(), tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_a_session_of_another_engine_is_refused(engine: Engine, bundle: Path) -> None:
    other = Engine.load(bundle, threads=1)
    with pytest.raises(UsageError, match="session: it is another engine's; make one with this engine's session"):
        engine.generate(ids("A"), session=other.session())


@pytest.mark.parametrize("call", ["append", "rewind", "mark"])
def test_an_interrupt_behind_a_native_call_leaves_a_session_that_works(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Ctrl-C comes when the call returns, before its result is noted."""
    session, again = engine.session(), ids("ABCDEFGABCD")
    engine.generate(ids("ABCDEFGABCDEFG"), max_tokens=3, session=session).text()
    native = getattr(genai._Context, call, None)
    if native is None:
        pytest.skip("this engine has no such call")

    def interrupted(*given: Any) -> None:
        native(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(genai._Context, call, interrupted)
        engine.generate(ids("ABCDx"), max_tokens=3, session=session).text()
    for _ in range(2):
        assert (
            engine.generate(again, max_tokens=3, session=session).text() == engine.generate(again, max_tokens=3).text()
        )


class _States:
    """A model whose states cannot go back."""

    token_bytes, state_bytes, rewinds, marks, keeps = 1000, 10, False, True, False

    def start(self, length: int, budget: Any) -> Any:
        return SimpleNamespace(
            append=lambda tokens, rows: None, mark=lambda: None, rewind=lambda count: None, kept=lambda count: []
        )


def test_a_session_that_begins_again_keeps_its_room() -> None:
    allowance: Any = SimpleNamespace(bits=8.0, within=lambda bits: bits, numbers_at=lambda bits: np.zeros(2))
    model: Any = _States()
    session = KeptContext(model, allowance, 131072, 512, marks=True)
    rooms = []
    for at in range(9):
        session.rewind_for(np.array([at + 1, 2, 3], np.int32), 16)
        session.append([at + 1, 2, 3])
        rooms.append(session.kept_bytes)
    assert len(set(rooms)) == 1
