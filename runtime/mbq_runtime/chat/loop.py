"""The loop of a chat: read a message or a command, answer it, repeat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from mbq_runtime.control.energy import describe
from mbq_runtime.control.metered_reply import MeteredReply
from mbq_runtime.engine.generation import speed_text
from mbq_runtime.errors import MbqError, UsageError

from .conversation import Conversation
from .screen import Screen

if TYPE_CHECKING:
    from mbq_runtime.control.bounds import BoundedEngine
    from mbq_runtime.control.governor import Governor, Status
    from mbq_runtime.engine import Engine, GenerationStats, KeptContext

PROMPT, MORE = ">>> ", "... "
_FENCE = '"""'

ReadLine = Callable[[str], str | None]
"""Shows a prompt and reads one line, without its end.  Returns None at the end of input."""


class Command(NamedTuple):
    """One command of the chat.

    argument: name of its argument in the help; help: one line for people; does: name of the method that runs it; the
    method returns whether the chat continues.
    """

    argument: str
    help: str
    does: str


COMMANDS = {
    "/bits": Command("N|auto", "use N bits per weight from now on, or let the policy choose", "_set_bits"),
    "/reset": Command("", "drop the conversation", "_reset"),
    "/help": Command("", "show this list", "_help"),
    "/exit": Command("", "end the chat; Ctrl-D does the same", "_exit"),
}
_ALIASES = {"/clear": "/reset", "/?": "/help", "/bye": "/exit", "/quit": "/exit"}


class Chat:
    """One chat in a terminal.

    Args:
        engine: a loaded engine.
        bounded: the same engine, as the governor controls it.
        governor: gives temperature, power and the reason of the budget.
        screen: shows the conversation.
        conversation: keeps the messages.
        options: arguments of ``Engine.generate``, without prompt and budget.
        session: what was read before; None: nothing.
    """

    def __init__(
        self,
        engine: Engine,
        bounded: BoundedEngine,
        governor: Governor,
        *,
        screen: Screen,
        conversation: Conversation,
        options: Mapping[str, Any],
        session: KeptContext | None = None,
    ) -> None:
        self._engine, self._bounded, self._governor = engine, bounded, governor
        self._screen, self._conversation, self._options = screen, conversation, options
        self._session = session or engine.session()  # a turn reads what is new, not the whole conversation

    def run(self, read: ReadLine) -> None:
        """Run until /exit or the end of input.  Ctrl-C ends a reply or an unfinished message, not the chat.

        Args:
            read: reads one line of the user.
        """
        goes_on = True
        while goes_on:
            try:
                text = self._read(read)
                goes_on = text is not None and self._respond(text)
            except KeyboardInterrupt:
                # This can happen at any time, also while a reply is prepared or its figures are shown.
                self._conversation.drop_unanswered()
                self._screen.note("\n/exit or Ctrl-D ends the chat")

    def _read(self, read: ReadLine) -> str | None:
        """One message: a line, or the lines up to one that ends with triple quotes.  None at the end of input."""
        line = read(PROMPT)
        if line is None or not line.lstrip().startswith(_FENCE):
            return line
        text = line.lstrip().removeprefix(_FENCE)
        while not text.rstrip().endswith(_FENCE):
            more = read(MORE)
            if more is None:
                return text
            text += "\n" + more
        return text.rstrip().removesuffix(_FENCE)

    def _respond(self, text: str) -> bool:
        """Answer a message or run a command.  Returns whether the chat continues."""
        word, _, argument = text.strip().partition(" ")
        if word.startswith("/"):
            return self._command(word, argument.strip())
        if word:
            self._answer(text)
        return True

    def _command(self, word: str, argument: str) -> bool:
        command = COMMANDS.get(_ALIASES.get(word, word))
        if command is None:
            self._screen.note(f"{word}: no such command; /help shows all commands")
            return True
        goes_on: bool = getattr(self, command.does)(argument)
        return goes_on

    def _set_bits(self, argument: str) -> bool:
        if argument == "auto":
            self._bounded.set_bounds(None, None)
        else:
            try:
                bits = self._bounded.manifest.budget.check(argument, "this bundle")  # type: ignore[arg-type]
            except UsageError as error:
                self._screen.note(str(error))
                return True
            self._bounded.set_bounds(bits, bits)
        self._screen.note(f"{self._bounded.avg_bits:g} bits")
        return True

    def _reset(self, _: str) -> bool:
        self._conversation.reset()
        return True

    def _help(self, _: str) -> bool:
        for word, command in COMMANDS.items():
            self._screen.note(f"{word + ' ' + command.argument:<14}{command.help}")
        self._screen.note(f"{_FENCE:<14}starts and ends a message of several lines")
        return True

    def _exit(self, _: str) -> bool:
        return False

    def _answer(self, text: str) -> None:
        try:
            forgotten = self._conversation.ask(text)
            if forgotten:
                turns = "turns" if forgotten > 1 else "turn"
                self._screen.note(f"(the context is full: {forgotten} earlier {turns} dropped)")
            reply = self._engine.generate(self._conversation.messages, session=self._session, **self._options)
        except MbqError as error:
            self._conversation.drop_unanswered()
            self._screen.note(str(error))
            return
        said, failed = [], None
        metered = MeteredReply(reply, self._governor)
        with self._screen.with_status() as show, reply:
            try:
                show("reading the prompt")
                for piece in metered:
                    said.append(piece.text)
                    self._screen.piece(piece.text, piece.bits)
                    show(self._status(reply.stats))
            except KeyboardInterrupt:
                pass
            except MbqError as error:
                failed = str(error)
        self._screen.line()
        if failed is not None:
            self._conversation.drop_unanswered()
            self._screen.note(failed)
            return
        self._conversation.answer("".join(said))
        tokens = len(reply.stats.tokens)
        energy = None if metered.energy_j is None else metered.energy_j / max(tokens, 1)
        self._screen.note(f"{tokens} tokens, {self._status(reply.stats)}, energy {describe(energy)}")

    def _status(self, stats: GenerationStats) -> str:
        status: Status = self._governor.status()
        temp_c = status.readings.temp_c
        parts = (
            speed_text(stats),
            f"{stats.avg_bits_used:.2f} bits",
            f"{temp_c:.0f} °C" if temp_c is not None else "temperature unknown",
            "set by you" if self._bounded.is_limiting else status.reason,
        )
        return ", ".join(parts)
