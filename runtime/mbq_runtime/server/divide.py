"""Divides a reply into its reasoning, its text and its calls of tools, as it comes."""

from __future__ import annotations

from collections.abc import Iterator

from mbq_runtime.engine.reasoning import Marks

from .tools import Call, CallReader, ToolFormat


class Thought(str):
    """Text of a model's reasoning."""

    __slots__ = ()


Piece = Thought | str | Call


class Divider:
    """Divides one reply.  A text that may be the start of a mark waits for what follows it.

    marks: around the reasoning; None where the model has none.
    tool_format: how the model writes calls; None: a reply has none.
    """

    def __init__(self, marks: Marks | None, tool_format: ToolFormat | None) -> None:
        self._marks = marks
        self._reader = None if tool_format is None else CallReader(tool_format)
        self._state = "answer" if marks is None else "start"
        self._held = ""

    @property
    def calls(self) -> int:
        """Calls so far."""
        return 0 if self._reader is None else self._reader.calls

    def feed(self, text: str, *, last: bool = False) -> list[Piece]:
        """What a text completes.

        Args:
            text: the next text of the reply.
            last: whether the reply ends with it.
        """
        found = list(self._feed(text, last))
        if last and self._reader is not None:
            found += self._reader.finish()
        return [piece for piece in found if piece]

    def _feed(self, text: str, last: bool) -> Iterator[Piece]:
        held, self._held = self._held + text, ""
        if self._state == "start":
            assert self._marks is not None
            opens, begin = self._marks.opens, held.lstrip()
            if begin.startswith(opens):
                self._state, held = "reasoning", begin.removeprefix(opens)
            elif opens.startswith(begin) and not last:
                self._held = held
                return
            else:
                self._state = "answer"
        if self._state == "reasoning":
            assert self._marks is not None
            thought, closes, held = held.partition(self._marks.closes)
            if closes:
                self._state = "space"
            else:
                keep = 0 if last else _overlap(thought, self._marks.closes)
                thought, self._held = thought[: len(thought) - keep], thought[len(thought) - keep :]
            yield Thought(thought)
        if self._state == "space":  # between the reasoning and the answer
            held = held.lstrip()
            self._state = "answer" if held else "space"
        if self._state == "answer":
            yield from (held,) if self._reader is None else self._reader.feed(held)


def _overlap(text: str, mark: str) -> int:
    """Characters at the end of a text that may be the start of a mark."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)
