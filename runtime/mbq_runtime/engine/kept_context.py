"""``KeptContext``: the tokens that an engine has read, kept from one reply to the next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .backend import Backend, Context

REREAD_BITS = 1.0
"""A kept token is read again when it was read with a budget that was lower than today's by more than this.

See docs/log.md."""


class KeptContext:
    """Tokens, and their keys and values.  ``Engine.session`` makes one.

    Give it to ``Engine.generate`` again and again: of each prompt, only what differs from the tokens so far is read.

    backend: the engine's model.
    budget: float32 [1], average bits per weight; read again in every pass.
    length: most tokens.
    """

    def __init__(self, backend: Backend, budget: NDArray[np.float32], length: int) -> None:
        self._backend, self._budget = backend, budget
        self._context: Context | None = None
        self._ids = np.zeros(length, np.int32)
        self._bits = np.zeros(length, np.float32)  # the budget with which each token was read
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def tokens(self) -> list[int]:
        """The ids that are kept."""
        return [int(token) for token in self._ids[: self._count]]

    @property
    def kept_bytes(self) -> int:
        """Bytes of the keys and values that are kept."""
        return self._count * self._backend.token_bytes

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
        self._context, self._count = None, 0

    def belongs_to(self, backend: Backend) -> bool:
        """Whether it keeps tokens of this model.

        Args:
            backend: an engine's model.
        """
        return backend is self._backend

    # The engine calls these while it makes a reply.

    def rewind_for(self, prompt: NDArray[np.int32]) -> int:
        """Keep what the prompt can use, and drop the rest.

        The last token of a prompt is always read: its logits are needed.

        Args:
            prompt: int32 [n], ids.

        Returns:
            How many tokens of the prompt need not be read.
        """
        count = min(self.common(prompt), len(prompt) - 1)
        poor = np.flatnonzero(self._bits[:count] < self._budget[0] - REREAD_BITS)
        count = int(poor[0]) if len(poor) else count
        if self._context is None:
            self._context = self._backend.start(len(self._ids), self._budget)
        elif count < self._count:
            self._context.rewind(count)
        self._count = count
        return count

    def append(self, tokens: NDArray[np.int32]) -> None:
        """Read tokens in one pass.

        Args:
            tokens: int32 [n], ids.
        """
        assert self._context is not None
        count, bits = self._count + len(tokens), self._budget[0]
        try:
            self._context.append(tokens)
        except BaseException:  # nobody knows what the pass has left behind
            self.clear()
            raise
        self._ids[self._count : count], self._bits[self._count : count] = tokens, bits
        self._count = count

    def last_logits(self) -> NDArray[np.float32]:
        """float32 [vocab]: logits of the last token that was read."""
        assert self._context is not None
        return self._context.last_logits()

    def bits_used(self) -> float:
        """Average bits per weight of the last pass, mean over its tokens."""
        assert self._context is not None
        return self._context.bits_used()
