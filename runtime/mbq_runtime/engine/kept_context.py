"""``KeptContext``: the tokens that an engine has read, kept from one reply to the next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.errors import UsageError

from .allowance import Allowance
from .backend import Backend, Context
from .session_file import check_size, open_regular, read_about, read_arrays, write

REREAD_BITS = 1.0
"""A kept token is read again when it was read with a budget that was lower than today's by more than this.

See docs/log.md."""

FIRST_TOKENS = 2048
"""Room of a new session.  A session that is full gets twice the room, and reads its tokens again.

Engines take the memory of a context at its start."""

_REPLY_TOKENS = 512  # room that is made for a reply before its prompt is read


class KeptContext:
    """Tokens, and their keys and values.  ``Engine.session`` makes one.

    Give it to ``Engine.generate`` again and again: of each prompt, only what differs from the tokens so far is read.

    backend: the engine's model.
    budget: read again before every pass.
    most: tokens that it can have.
    chunk: most tokens of a pass.
    first: room at the start, in tokens.
    marks: whether a place in each prompt is marked, where the model's states allow it.
    """

    def __init__(
        self, backend: Backend, budget: Allowance, most: int, chunk: int, *, first: int = FIRST_TOKENS,
        marks: bool = False,
    ) -> None:  # fmt: skip
        self._backend, self._budget, self._most, self._chunk, self._first = backend, budget, most, chunk, first
        self.marks = marks and backend.marks
        self._marked = 0  # tokens behind which states were kept; 0: none
        self._budget_of_pass = np.zeros(2, np.float32)  # the native side reads it
        self._context: Context | None = None
        self._room = 0
        self._ids = np.zeros(0, np.int32)
        self._bits = np.zeros(0, np.float32)  # the budget with which each token was read
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def avg_bits(self) -> float:
        """The budget of the next pass."""
        return self._budget.bits

    @property
    def tokens(self) -> list[int]:
        """The ids that are kept."""
        return [int(token) for token in self._ids[: self._count]]

    @property
    def kept_bytes(self) -> int:
        """Bytes of memory for keys, values and states."""
        return 0 if self._context is None else self._room * self._backend.token_bytes + self._state_bytes

    @property
    def _state_bytes(self) -> int:
        return (1 + self.marks) * self._backend.state_bytes

    def common(self, prompt: Sequence[int] | NDArray[np.int32]) -> int:
        """How many tokens at the start of a prompt are kept.

        Args:
            prompt: ids.
        """
        count = min(self._count, len(prompt))
        differs = np.flatnonzero(self._ids[:count] != np.asarray(prompt[:count], np.int32))
        return int(differs[0]) if len(differs) else count

    def clear(self) -> None:
        """Forget all tokens, and free their memory."""
        self._context, self._count, self._room, self._marked = None, 0, 0, 0

    @property
    def first_bytes(self) -> int:
        """Bytes of memory that it takes when its first prompt is short."""
        return min(self._first, self._most) * self._backend.token_bytes + self._state_bytes

    def belongs_to(self, backend: Backend) -> bool:
        """Whether it keeps tokens of this model.

        Args:
            backend: an engine's model.
        """
        return backend is self._backend

    def save(self, path: Path, about: Mapping[str, Any]) -> None:
        """Write the tokens, their keys and their values to a file.  ``Engine.save_session`` calls it.

        Args:
            path: the file.
            about: whose they are, see ``session_file.owner``.

        Raises:
            UsageError: the file cannot be written.
        """
        count = self._count
        kept = [] if self._context is None else self._context.kept(count)
        write(path, {**about, "tokens": count}, [self._ids[:count], self._bits[:count], *kept])

    def load(self, path: Path, about: Mapping[str, Any]) -> None:
        """Take the tokens of a file in place of those so far.  ``Engine.load_session`` calls it.

        Args:
            path: the file.
            about: whose they must be.

        Raises:
            UsageError: the file cannot be read, is damaged or another model's, or has too many tokens.
        """
        try:
            with open_regular(path) as file:
                found = read_about(file, path, about)
                count = found["tokens"]
                if not 0 <= count < self._most:
                    raise UsageError(f"{path}: {count} tokens; needed 0 to {self._most - 1}, this engine's context")
                check_size(file, path, count * (self._ids.itemsize + self._bits.itemsize + self._backend.token_bytes))
                self._make_room(count)
                assert self._context is not None
                like = [self._ids[:count], self._bits[:count], *(self._context.kept(count) if count else ())]
                ids, bits, *kept = read_arrays(file, path, found, like)
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror}); give another file") from None
        if count:
            self._context.keep(count, kept)
        self._ids[:count], self._bits[:count], self._count = ids, bits, count

    # The engine calls these while it makes a reply.

    def rewind_for(self, prompt: NDArray[np.int32], max_tokens: int) -> int:
        """Keep what the prompt can use, and drop the rest.

        The last token of a prompt is always read: its logits are needed.

        Args:
            prompt: int32 [n], ids.
            max_tokens: most tokens of the reply.

        Returns:
            How many tokens of the prompt need not be read.
        """
        room = min(len(prompt) + min(max_tokens, _REPLY_TOKENS), self._most)
        if room > self._room:
            self._make_room(room)
        assert self._context is not None
        count = min(self.common(prompt), len(prompt) - 1)
        # A file may say that a budget is not a number.
        poor = np.flatnonzero(~(self._bits[:count] >= self._budget.bits - REREAD_BITS))
        count = int(poor[0]) if len(poor) else count
        if count < self._count and not self._backend.rewinds:
            if not 0 < self._marked <= count:
                self._make_room(room)
                return 0
            count = self._marked
        self.rewind(count)
        return count

    def mark(self) -> None:
        """Make this a place that ``rewind_for`` can come back to, in place of the one before.  Only for ``marks``."""
        assert self._context is not None
        with self._whole():
            self._context.mark()
            self._marked = self._count

    def rewind(self, count: int) -> None:
        """Drop the last tokens.  A pass must follow before the next logits.

        Args:
            count: tokens that stay, from 0 to the number so far.
        """
        assert self._context is not None
        with self._whole():
            if count < self._count:
                self._context.rewind(count)
            self._count = count

    def append(self, tokens: Sequence[int] | NDArray[np.int32], rows: int = 1, avg_bits: float | None = None) -> None:
        """Read tokens in one pass.

        Args:
            tokens: int [n], ids; ``most`` bounds them and those so far.
            rows: how many of the last tokens get logits, 1 to n.
            avg_bits: average bits per weight of this pass; None for the budget.
        """
        tokens = np.asarray(tokens, np.int32)
        count = self._count + len(tokens)
        if count > self._room:
            kept = self._ids[: self._count].copy()
            self._make_room(count)
            for start in range(0, len(kept), self._chunk):
                self._read(kept[start : start + self._chunk])
        self._read(tokens, rows, avg_bits)

    def _make_room(self, room: int) -> None:
        """Start again with no tokens.  The old memory goes first."""
        more = 2 * self._room if room > self._room else self._room
        room = min(max(room, more, self._first), self._most)
        self.clear()
        self._context = self._backend.start(room, self._budget_of_pass)
        self._room, self._ids, self._bits = room, np.zeros(room, np.int32), np.zeros(room, np.float32)

    def _read(self, tokens: NDArray[np.int32], rows: int = 1, avg_bits: float | None = None) -> None:
        assert self._context is not None
        count, bits = (
            self._count + len(tokens),
            self._budget.within(self._budget.bits if avg_bits is None else avg_bits),
        )
        self._budget_of_pass[:] = self._budget.numbers_at(bits)
        with self._whole():
            self._context.append(tokens, rows)
            self._ids[self._count : count], self._bits[self._count : count] = tokens, bits
            self._count = count

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Forget all tokens where a change does not come to its end: nobody knows what it has left behind.

        An interrupt comes when a native call returns, before its result is noted.
        """
        try:
            yield
        except BaseException:
            self.clear()
            raise

    def logits(self) -> NDArray[np.float32]:
        """float32 [rows, vocab]: logits of the last tokens that were read.  Valid until the next pass."""
        assert self._context is not None
        return self._context.logits()

    def bits_used(self) -> float:
        """Average bits per weight of the last pass, mean over its tokens."""
        assert self._context is not None
        return self._context.bits_used()
