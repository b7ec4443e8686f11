"""Divides a reply into its reasoning, its text and its calls of tools, as it comes."""

from __future__ import annotations

from mbq_runtime.engine.reasoning import Marks, Thought, ThoughtReader

from .tool_format import Call, ToolFormat
from .tools import CallReader

Piece = Thought | str | Call


class Divider:
    """Divides one reply.  A text that may be the start of a mark waits for what follows it.

    marks: around the reasoning; None where the model has none.
    tool_format: how the model writes calls; None: a reply has none.
    """

    def __init__(self, marks: Marks | None, tool_format: ToolFormat | None) -> None:
        self._thoughts = ThoughtReader(marks)
        self._reader = None if tool_format is None else CallReader(tool_format)

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
        found: list[Piece] = []
        for piece in self._thoughts.feed(text, last=last):
            found += (piece,) if self._reader is None or isinstance(piece, Thought) else self._reader.feed(piece)
        if last and self._reader is not None:
            found += self._reader.finish()
        return [piece for piece in found if piece]
