from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forked_mbq import Mbq
from tiny_bundle import CONTEXT, REPLY

from mbq_runtime import BundleError, Engine
from mbq_runtime.chat.conversation import Conversation
from mbq_runtime.chat.loop import COMMANDS, Chat
from mbq_runtime.chat.screen import Screen
from mbq_runtime.control.bounds import BoundedEngine
from mbq_runtime.sensing.readings import Readings

PATIENCE_S = 60.0


class Talk:
    """A chat with scripted input.  out: the conversation; notes: the notes."""

    def __init__(self, engine: Engine, **readings: Any) -> None:
        self.bounded = BoundedEngine(engine)
        status = SimpleNamespace(reason="no pressure", readings=Readings(0.0, **readings))
        governor: Any = SimpleNamespace(status=lambda: status)
        self.conversation = Conversation(engine)
        self._out, self._notes = io.StringIO(), io.StringIO()
        screen = Screen(self._out, self._notes, terminal=False, colour=False)
        options = {"max_tokens": 20, "temperature": 0.0}
        self._chat = Chat(
            engine, self.bounded, governor, screen=screen, conversation=self.conversation, options=options
        )

    def say(self, *lines: str | type[BaseException]) -> tuple[str, str]:
        """Type lines.  Returns the new text of (out, notes)."""
        script: Iterator[str | type[BaseException]] = iter(lines)

        def read(_: str) -> str | None:
            line = next(script, None)
            if isinstance(line, type):
                raise line
            return line

        self._chat.run(read)
        found = self._out.getvalue(), self._notes.getvalue()
        for stream in (self._out, self._notes):
            stream.seek(0)
            stream.truncate()
        return found


@pytest.fixture
def talk(engine: Engine) -> Talk:
    return Talk(engine, temp_c=61.4, power_w=3.0)


def test_a_reply_and_its_figures(talk: Talk) -> None:
    out, notes = talk.say("hello")
    assert out == REPLY + "\n"
    assert notes.startswith("11 tokens, ")
    for words in (" tokens/s, 8.10 bits, 61 °C, no pressure, energy ", " J/token\n"):
        assert words in notes
    assert talk.conversation.messages == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": REPLY},
    ]


def test_what_no_sensor_tells_is_unknown(engine: Engine) -> None:
    _, notes = Talk(engine).say("hello")
    assert "temperature unknown" in notes
    assert "energy unknown (no power sensor)" in notes


def test_bits_by_hand(talk: Talk) -> None:
    talk.bounded.avg_bits = 6.0
    _, notes = talk.say("/bits 4", "hello")
    assert notes.startswith("4 bits\n")
    assert "4.10 bits, 61 °C, set by you" in notes
    _, notes = talk.say("/bits auto", "hello")
    assert notes.startswith("6 bits\n")
    assert "6.10 bits, 61 °C, no pressure" in notes
    for bad in ("/bits", "/bits lots", "/bits 9", "/bits nan"):
        assert "takes a number from 3 to 8" in talk.say(bad)[1]
    assert talk.bounded.avg_bits == 6.0


def test_reset_forgets_all_but_the_system_s_message(engine: Engine) -> None:
    talk = Talk(engine)
    talk.conversation = Conversation(engine, "Be kind.")
    talk._chat._conversation = talk.conversation
    talk.say("hello", "/reset")
    assert talk.conversation.messages == [{"role": "system", "content": "Be kind."}]
    talk.say("hello", "/clear", "x")
    assert [m["content"] for m in talk.conversation.messages][:2] == ["Be kind.", "x"]


def test_an_engine_that_fails_in_a_reply_does_not_end_the_chat(engine: Engine, talk: Talk) -> None:
    def fail(seconds: float, bits: float) -> None:
        engine.remove_listener(fail)
        raise BundleError("model.onnx: the engine failed")

    engine.add_listener(fail)
    out, notes = talk.say("hello", "hello")
    assert notes.startswith("model.onnx: the engine failed\n11 tokens, ")
    assert out.endswith("\n" + REPLY + "\n")
    assert [message["role"] for message in talk.conversation.messages] == ["user", "assistant"]


@pytest.mark.parametrize("word", ["/exit", "/bye", "/quit"])
def test_leaving(talk: Talk, word: str) -> None:
    assert talk.say(word, "hello") == ("", "")


def test_help_names_every_command_and_an_unknown_one_says_so(talk: Talk) -> None:
    _, notes = talk.say("/help")
    assert [line.split()[0] for line in notes.splitlines()] == [*COMMANDS, '"""']
    assert talk.say("/nope", "") == ("", "/nope: no such command; /help shows all commands\n")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (('"""first', "/exit", '  third"""'), "first\n/exit\n  third"),
        (('"""', "x", '"""  '), "\nx\n"),
        (('"""one line"""',), "one line"),
        (('  """def f():', '    """Half.""" # of it', '"""'), 'def f():\n    """Half.""" # of it\n'),
        (('"""a""" and b', 'c"""'), 'a""" and b\nc'),
        (('"""no end', "of it "), "no end\nof it "),
    ],
)
def test_a_message_of_several_lines(talk: Talk, lines: tuple[str, ...], message: str) -> None:
    """A line that ends with three quotes ends it, as in ollama; no text is lost."""
    talk.say(*lines)
    assert talk.conversation.messages[0]["content"] == message


def test_an_interrupt_at_the_prompt_does_not_leave(talk: Talk) -> None:
    out, notes = talk.say(KeyboardInterrupt, "hello")
    assert out == REPLY + "\n"
    assert notes.startswith("\n/exit or Ctrl-D ends the chat\n")


def test_an_interrupt_ends_the_reply_and_keeps_what_was_said(engine: Engine, talk: Talk) -> None:
    heard = []

    def interrupt(seconds: float, bits: float) -> None:
        heard.append(bits)
        if len(heard) == 3:
            raise KeyboardInterrupt

    engine.add_listener(interrupt)
    try:
        out, _ = talk.say("hello", "/bits 8")
    finally:
        engine.remove_listener(interrupt)
    assert out == REPLY[:3] + "\n"
    assert talk.conversation.messages[-1] == {"role": "assistant", "content": REPLY[:3]}
    assert talk.say("/reset", "hello")[0] == REPLY + "\n"  # the engine is free


def test_an_interrupt_beside_a_reply_does_not_leave(
    engine: Engine, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt before the reply drops the message; an interrupt after the last token keeps the reply."""

    def interrupted(*_: object, **__: object) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "generate", interrupted)
    assert talk.say("lost", "hello")[0] == REPLY + "\n"
    assert [m["content"] for m in talk.conversation.messages] == ["hello", REPLY]
    monkeypatch.setattr(talk.conversation, "answer", interrupted)
    assert talk.say("lost", "hello")[0] == f"{REPLY}\n{REPLY}\n"
    assert [m["content"] for m in talk.conversation.messages] == ["hello", REPLY] * 2


def test_a_message_too_long_is_taken_back(talk: Talk) -> None:
    _, notes = talk.say("x" * CONTEXT)
    assert "tokens long" in notes
    assert talk.conversation.messages == []
    assert talk.say("hello")[0] == REPLY + "\n"


def test_the_oldest_turns_make_room_for_several_more(engine: Engine) -> None:
    """What follows a dropped turn is read again, so that half of the context is freed at once."""
    conversation = Conversation(engine)
    for i in range(3):
        forgotten = conversation.ask(f"question {i}")
        conversation.answer("yes")
    assert forgotten == 2
    assert [m["content"] for m in conversation.messages] == ["question 2", "yes"]
    assert conversation.ask("y" * 60) == 1
    assert [m["content"] for m in conversation.messages] == ["y" * 60]


def test_a_turn_reads_what_is_new(talk: Talk) -> None:
    talk.say("hi")
    reply = talk._chat._engine.generate(
        [*talk.conversation.messages, {"role": "user", "content": "x"}], max_tokens=1, session=talk._chat._session
    )
    reply.text()
    new = "\x02\n\x01user\nx\x02\n\x01assistant\n"  # from the end token of the reply, a letter a token
    assert reply.stats.prompt_tokens - reply.stats.cached_tokens == len(new)


def test_from_a_pipe_to_a_file(bundle: Path, mbq: Mbq) -> None:
    done = mbq(["chat", bundle, "--temperature", 0, "--bits", 8, "--show-bits"], "hello\n\nhello\n")
    assert (done.code, done.out) == (0, f"{REPLY}\n{REPLY}\n")
    assert done.err.count("energy ") == 2


def test_on_a_terminal(bundle: Path) -> None:
    """A real terminal: colours, a status line, Ctrl-C at the prompt, Ctrl-D to end."""
    master, slave = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm"}
    command = [sys.executable, "-m", "mbq_runtime.cli", "chat", str(bundle), "--temperature", "0", "--bits", "8"]
    chat = subprocess.Popen(
        [*command, "--show-bits"], stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
    )
    os.close(slave)
    seen = ""

    def until(words: str, again: Callable[[], object] = lambda: None) -> None:
        """Wait for a text.  again: called after each second without it."""
        nonlocal seen
        end_s = time.monotonic() + PATIENCE_S
        while words not in seen:
            assert time.monotonic() < end_s, seen
            if select.select([master], [], [], 1)[0]:
                seen += os.read(master, 1 << 16).decode(errors="replace")
            else:
                again()

    until(">>> ")
    assert "bits: " in seen
    os.write(master, b"hello\n")
    until("energy ")
    assert "\x1b[38;5;33mH\x1b[39m" in seen
    assert "reading the prompt" in seen
    seen = ""
    # A signal that falls just before the terminal is waited for is noticed with the next one.
    chat.send_signal(signal.SIGINT)
    until("Ctrl-D ends the chat", again=lambda: chat.send_signal(signal.SIGINT))
    # A key typed before the prompt is there would be read by the terminal, not by the chat.
    seen = seen.partition("Ctrl-D ends the chat")[2]
    until(">>> ")
    os.write(master, b"\x04")
    assert chat.wait(PATIENCE_S) == 0
    os.close(master)


def test_a_model_without_chat_template(bundle_copy: Path, mbq: Mbq) -> None:
    (bundle_copy / "chat_template.jinja").unlink()
    from tiny_bundle import write_manifest

    write_manifest(bundle_copy)
    done = mbq(["chat", bundle_copy])
    assert done.code == 2
    assert done.err.strip().endswith("the model has no chat template; use mbq run --raw")
