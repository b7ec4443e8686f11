"""The messages of a conversation.  The oldest ones are dropped when the context is full."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mbq_runtime.engine import Engine

Message = dict[str, str]

_FULL = 3 / 4  # share of the context from which turns are dropped: the rest is for the reply
_FREED = 1 / 2  # share that is left after that: what follows a dropped turn is read again, so it must be rare


class Conversation:
    """Messages of the user and the model in turn, after a system message if there is one.

    Args:
        engine: counts the tokens of the messages.
        system: text of the system message; None: no system message.
        template_kwargs: variables of the chat template.
    """

    def __init__(
        self, engine: Engine, system: str | None = None, template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self._engine, self._template_kwargs = engine, template_kwargs
        self._opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """All messages, each with ``role`` and ``content``."""
        return [*self._opening, *self._turns]

    def ask(self, text: str) -> int:
        """Add a message of the user.  When the context is full, drop the oldest turns until half of it is free.

        The new message is never dropped.  If it is too long, the engine gives the error.

        Args:
            text: the message.

        Returns:
            Number of turns that were dropped.
        """
        self._turns.append({"role": "user", "content": text})
        forgotten, room = 0, _FULL
        while len(self._turns) > 1 and self._length() > room * self._engine.context_length:
            del self._turns[:2]
            forgotten, room = forgotten + 1, _FREED
        return forgotten

    def answer(self, text: str) -> None:
        """Add a message of the model.

        Args:
            text: the reply, complete or interrupted.
        """
        self._turns.append({"role": "assistant", "content": text})

    def drop_unanswered(self) -> None:
        """Drop the last message of the user if it has no answer."""
        if self._turns and self._turns[-1]["role"] == "user":
            self._turns.pop()

    def reset(self) -> None:
        """Drop all messages except the system message."""
        self._turns.clear()

    def _length(self) -> int:
        return len(self._engine.encode(self._engine.chat_prompt(self.messages, self._template_kwargs)))
