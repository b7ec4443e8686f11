"""One measurement for every side: the same windows of the same tokens, and the same formulas.

Of each window, tokens 1 to context - 1 are predicted from those before them.  Per window are kept the mean
negative log-likelihood, the mean Kullback-Leibler divergence from the float32 model's distribution (nats), and
the share of positions where both find the same token most likely.  Windows are the unit of every standard
error: tokens of one window are not independent.  A ratio of two perplexities is of the same windows, so its
error is that of the paired differences d_w = m_w - r_w::

    ratio  = exp(mean(d))
    stderr = ratio * sqrt(sum((d_w - mean(d))**2) / (W - 1) / W)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from mbq_runtime.engine import Window
from mbq_runtime.perplexity import Windows, estimate

Forward = Callable[[Sequence[int]], Window]
"""Tokens -> logits of every position, and the bits that were used."""
Progress = Callable[[int, int], None]
"""Called with (windows done, windows in all)."""


@dataclass(frozen=True)
class Side:
    """One way to store the model's linear layers.

    bits: what it is called after, or None; linear_bytes: from the average bits used, all that one token reads of
    linear layers, the head among them, with scales, zeros and routers; block_bytes: the same without the head, or
    None where the split depends on the token; head: how the head is stored, in words.
    """

    method: str
    name: str
    bits: float | None
    linear_bytes: Callable[[float], int]
    block_bytes: int | None
    head: str
    forward: Forward


@dataclass(frozen=True)
class Mean:
    """value and its standard error, which a single window does not have."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Scores:
    """One value for each window.  nll, divergence: nats; agreement: 0 to 1; bits: average used."""

    nll: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    bits: list[float] = field(default_factory=list)

    @property
    def ppl(self) -> Mean:
        return _perplexity(self.nll)

    def ppl_over(self, other: Scores) -> Mean:
        """This perplexity over that of ``other``, measured on the same windows."""
        return _perplexity([a - b for a, b in zip(self.nll, other.nll, strict=True)])


def _perplexity(nll: Sequence[float]) -> Mean:
    """Of windows, or of one model over another's when ``nll`` are the differences of theirs."""
    found = estimate(nll)
    return Mean(found.ppl, found.ppl_stderr)


def mean(values: Sequence[float]) -> Mean:
    """The mean and its standard error over ``values``."""
    count = len(values)
    value = math.fsum(values) / count
    if count < 2:
        return Mean(value, None)
    return Mean(value, math.sqrt(math.fsum((v - value) ** 2 for v in values) / (count - 1) / count))


class Reference:
    """The float32 model's log-probabilities on some windows, in a file: they may not fit in memory.

    A context manager, which removes the file.  scores: the float32 model's own, against itself.
    """

    def __init__(self, side: Side, windows: Windows, progress: Progress) -> None:
        self.windows = windows
        self.scores = Scores()
        self._folder = TemporaryDirectory(prefix="mbq-compare-")
        file = Path(self._folder.name) / "log_probabilities.f32"
        self._stored: list[NDArray[np.float32]] = []
        offset = 0
        for done, window in enumerate(windows, 1):
            logits, bits = side.forward(window)
            expected = _log_softmax(logits[:-1])
            with file.open("ab") as sink:
                expected.numpy().tofile(sink)
            shape = (expected.shape[0], expected.shape[1])
            self._stored.append(np.memmap(file, np.float32, "r", offset, shape))
            offset += expected.numel() * 4
            _append(self.scores, window, expected, expected, bits)
            progress(done, len(windows))

    def measure(self, side: Side, progress: Progress) -> Scores:
        """Every window's scores under ``side``."""
        scores = Scores()
        for done, (window, stored) in enumerate(zip(self.windows, self._stored, strict=True), 1):
            logits, bits = side.forward(window)
            _append(scores, window, _log_softmax(logits[:-1]), torch.from_numpy(np.array(stored)), bits)
            progress(done, len(self.windows))
        return scores

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stored.clear()
        self._folder.cleanup()


def _log_softmax(logits: NDArray[np.float32]) -> torch.Tensor:
    """float32 [S, V] -> float32 [S, V]."""
    return torch.log_softmax(torch.from_numpy(logits), dim=-1)


def _append(scores: Scores, window: Sequence[int], found: torch.Tensor, expected: torch.Tensor, bits: float) -> None:
    """found, expected: log-probabilities float32 [S - 1, V] of tokens 1 to S - 1."""
    targets = torch.tensor(window[1:])[:, None]
    scores.nll.append(-float(found.gather(1, targets).double().mean()))
    scores.divergence.append(float((expected.exp() * (expected - found)).sum(dim=1).double().mean()))
    scores.agreement.append(float((found.argmax(dim=1) == expected.argmax(dim=1)).double().mean()))
    scores.bits.append(bits)
