"""What has been said, kept short enough for the model to read."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mbq_runtime.engine import Engine

Message = dict[str, str]

_REPLY_SHARE = 4  # a quarter of the context stays free for the reply


class Conversation:
    """Alternating messages of the user and the model, after the system's if there is one."""

    def __init__(self, engine: Engine, system: str | None = None) -> None:
        self._engine = engine
        self._opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        return [*self._opening, *self._turns]

    def ask(self, text: str) -> int:
        """Add the user's message and forget the oldest turns until all fits; returns how many were forgotten.

        The message itself stays, however long it is: the engine then says what does not fit.
        """
        self._turns.append({"role": "user", "content": text})
        room = self._engine.context_length - self._engine.context_length // _REPLY_SHARE
        forgotten = 0
        while len(self._turns) > 1 and self._length() > room:
            del self._turns[:2]
            forgotten += 1
        return forgotten

    def answer(self, text: str) -> None:
        """Add the model's message, whole or as far as it came."""
        self._turns.append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        """Forget the user's last message if it was not answered."""
        if self._turns and self._turns[-1]["role"] == "user":
            self._turns.pop()

    def reset(self) -> None:
        self._turns.clear()

    def _length(self) -> int:
        return len(self._engine.encode(self._engine.chat_prompt(self.messages)))
