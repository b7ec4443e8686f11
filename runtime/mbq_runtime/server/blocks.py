"""Replies that are a list of blocks: reasoning, text and calls of tools, one after the other."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any, Literal

from mbq_runtime.engine.reasoning import Thought

from .divide import Divider
from .errors import ApiError
from .replies import joined
from .tool_format import Call
from .worker import Job, Part, Result

Kind = Literal["reasoning", "text", "call"]


class BlockShape:
    """The common part of such formats, see ``replies.Shape``.

    Args:
        divider: divides the reply.
    """

    def __init__(self, divider: Divider) -> None:
        self._divider = divider
        self._open: Kind | None = None
        self._text = ""
        self._blocks: list[dict[str, Any]] = []  # those that are complete

    # A format gives these.

    def started(self, prompt_tokens: int) -> Iterator[bytes]:
        """Events before the first block.

        Args:
            prompt_tokens: tokens of the prompt.
        """
        raise NotImplementedError

    def opened(self, kind: Kind, at: int) -> Iterator[bytes]:
        """Events that open a block of reasoning or text.

        Args:
            kind: "reasoning" or "text".
            at: number of the block.
        """
        raise NotImplementedError

    def grown(self, kind: Kind, at: int, text: str) -> Iterator[bytes]:
        """Events that add to the open block.

        Args:
            kind: of the block.
            at: number of the block.
            text: what is added.
        """
        raise NotImplementedError

    def closed(self, kind: Kind, at: int, block: dict[str, Any]) -> Iterator[bytes]:
        """Events that close the open block.

        Args:
            kind: of the block.
            at: number of the block.
            block: the whole block.
        """
        raise NotImplementedError

    def called(self, at: int, block: dict[str, Any], arguments: str) -> Iterator[bytes]:
        """Events of a call.

        Args:
            at: number of the block.
            block: the whole block.
            arguments: JSON.
        """
        raise NotImplementedError

    def block(self, kind: Kind, text: str) -> dict[str, Any]:
        """A block of reasoning or text.

        Args:
            kind: "reasoning" or "text".
            text: all of it.
        """
        raise NotImplementedError

    def call(self, call: Call) -> dict[str, Any]:
        """A block of a call.

        Args:
            call: name and arguments.
        """
        raise NotImplementedError

    def ended(self, blocks: list[dict[str, Any]], result: Result) -> Iterator[bytes]:
        """Events after the last block.

        Args:
            blocks: all of them.
            result: the figures.
        """
        raise NotImplementedError

    def failed(self, error: ApiError) -> Iterator[bytes]:
        """Events of an error, after which nothing comes.

        Args:
            error: the error.
        """
        raise NotImplementedError

    def whole(self, blocks: list[dict[str, Any]], result: Result) -> dict[str, Any]:
        """The JSON object of a reply.

        Args:
            blocks: all of them.
            result: the figures.
        """
        raise NotImplementedError

    # Reply calls these.

    async def events(self, job: Job) -> AsyncGenerator[bytes, None]:
        """See ``replies.Shape``.

        Args:
            job: whose parts are read.
        """
        try:
            await job.started()
            for one in self.started(len(job.prompt)):
                yield one
            async for part in job.parts():
                for one in self._add(part.text):
                    yield one
        except ApiError as error:  # the status was already sent
            for one in self.failed(error):
                yield one
            return
        for one in (*self._add("", last=True), *self._close(), *self.ended(self._blocks, job.result)):
            yield one

    def document(self, parts: Sequence[Part], result: Result) -> dict[str, Any]:
        """See ``replies.Shape``.

        Args:
            parts: all of them.
            result: the figures.
        """
        for _ in (*self._add(joined(0, parts).text, last=True), *self._close()):
            pass
        return self.whole(self._blocks, result)

    def _add(self, text: str, *, last: bool = False) -> Iterator[bytes]:
        for piece in self._divider.feed(text, last=last):
            kind: Kind = "call" if isinstance(piece, Call) else "reasoning" if isinstance(piece, Thought) else "text"
            if kind != self._open:
                yield from self._close()
            if isinstance(piece, Call):
                block = self.call(piece)
                self._blocks.append(block)
                yield from self.called(len(self._blocks) - 1, block, piece.arguments)
                continue
            if self._open is None:
                self._open, self._text = kind, ""
                yield from self.opened(kind, len(self._blocks))
            self._text += piece
            yield from self.grown(kind, len(self._blocks), piece)

    def _close(self) -> Iterator[bytes]:
        if self._open is not None:
            kind, self._open = self._open, None
            block = self.block(kind, self._text)
            self._blocks.append(block)
            yield from self.closed(kind, len(self._blocks) - 1, block)
