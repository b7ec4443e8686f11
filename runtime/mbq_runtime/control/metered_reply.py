"""A reply with measurements: the bits of each piece of text, and the energy of the whole reply."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mbq_runtime.engine import Generation

    from .governor import Governor


class Piece(NamedTuple):
    """One piece of a reply.

    text: text of one token in most cases; tokens: number of tokens that gave it; bits: their average bits per weight,
    NaN when there are none.
    """

    text: str
    tokens: int
    bits: float


class MeteredReply:
    """A reply that counts bits and energy.  Iterate over it in place of ``reply``.

    ``energy_j`` is the energy in J that the board's sensor measured so far, prompt included.  It is None when the
    power was unknown at any time.  The time that the reader takes between two pieces is not counted.

    Args:
        reply: what ``Engine.generate`` returned.
        governor: the governor that reads the power.
        clock: returns seconds.
    """

    def __init__(self, reply: Generation, governor: Governor, clock: Callable[[], float] = time.perf_counter) -> None:
        self._reply, self._governor, self._clock = reply, governor, clock
        self.energy_j: float | None = 0.0

    def __iter__(self) -> Iterator[Piece]:
        seen = 0
        start_s = self._clock()
        for text in self._reply:
            bits = self._reply.stats.bits[seen:]
            self._count(self._clock() - start_s)
            seen += len(bits)
            yield Piece(text, len(bits), math.fsum(bits) / len(bits) if bits else math.nan)
            start_s = self._clock()  # leaves out the reader's own time
        self._count(self._clock() - start_s)

    def _count(self, spent_s: float) -> None:
        power_w = self._governor.status().readings.power_w
        self.energy_j = None if power_w is None or self.energy_j is None else self.energy_j + power_w * spent_s
