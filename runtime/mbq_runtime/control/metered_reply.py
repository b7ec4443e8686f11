"""A reply with its figures: the bits of each piece of text, and the energy it all took."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mbq_runtime.engine import Generation

    from .governor import Governor


class Piece(NamedTuple):
    """text: of one token, as a rule; tokens: how many passes gave it; bits: their mean."""

    text: str
    tokens: int
    bits: float


class MeteredReply:
    """Iterate over it instead of over ``reply``.  clock: seconds.

    energy_j: drawn since the first piece was asked for, prompt included, by what the board's sensor
    measures; None as soon as the power was unknown.
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
            start_s = self._clock()  # what the reader took is not the engine's
        self._count(self._clock() - start_s)

    def _count(self, spent_s: float) -> None:
        power_w = self._governor.status().readings.power_w
        self.energy_j = None if power_w is None or self.energy_j is None else self.energy_j + power_w * spent_s
