"""One measurement for every side: the same windows of the same tokens, and the same formulas.

In each window, tokens 1 to context - 1 are predicted from those before them.  For each window the module keeps three
means over positions: the negative log-likelihood (nats), the Kullback-Leibler divergence from the float32 model's
distribution (nats), and the share of positions where both models find the same token most likely.  It keeps the
divergence of each token too, for percentiles (see ``mbq_runtime.fidelity``).  Tokens of one
window are not independent, so standard errors are over windows.  A ratio of two perplexities is measured on the same
windows, so its error is that of the paired differences d_w = m_w - r_w::

    ratio  = exp(mean(d))
    stderr = ratio * sqrt(sum((d_w - mean(d))**2) / (W - 1) / W)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from mbq_export.progress import StageReport
from mbq_runtime.engine import Window
from mbq_runtime.fidelity import Mean, compare_tokens, mean
from mbq_runtime.perplexity import Windows, estimate

_LOWEST = np.finfo(np.float16).min
"""A probability of 0 is kept as that of this logit, which is 0 in float64 too."""

Forward = Callable[[Sequence[int]], Window]
"""From tokens to the logits of every position and the average bits used."""


@dataclass(frozen=True)
class Side:
    """One way to store the model's linear layers.

    method: a name in ``rivals.METHODS``; name: its name in the table; bits: its nominal bits per weight, or None;
    linear_bytes: from the average bits used, the bytes of linear layers that one token reads, with the head, scales,
    zeros and routers; block_bytes: the same without the head, or None where the split depends on the token;
    head: how the head is stored, in words; forward: runs the model.
    """

    method: str
    name: str
    bits: float | None
    linear_bytes: Callable[[float], int]
    block_bytes: int | None
    head: str
    forward: Forward


@dataclass(frozen=True)
class Scores:
    """One value for each window.

    nll, divergence: mean over tokens in nats; agreement: 0 to 1; bits: average bits used;
    token_divergence: float64 [context - 1] nats.
    """

    nll: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    bits: list[float] = field(default_factory=list)
    token_divergence: list[NDArray[np.float64]] = field(default_factory=list, compare=False, repr=False)

    @property
    def ppl(self) -> Mean:
        """The perplexity."""
        return _perplexity(self.nll)

    def ppl_over(self, other: Scores) -> Mean:
        """This perplexity over another one.

        Args:
            other: measured on the same windows.
        """
        return _perplexity([a - b for a, b in zip(self.nll, other.nll, strict=True)])

    def divergence_less(self, other: Scores) -> Mean:
        """This KL divergence less another one, in nats a token.

        Args:
            other: measured on the same windows.
        """
        return mean([a - b for a, b in zip(self.divergence, other.divergence, strict=True)])


def _perplexity(nll: Sequence[float]) -> Mean:
    """The perplexity of windows, or the ratio of two perplexities from the differences of their windows."""
    found = estimate(nll)
    return Mean(found.ppl, found.ppl_stderr)


class Reference:
    """The float32 model's logits, in a file because they may not fit in memory.

    A context manager, which removes the file.  ``scores`` are the float32 model's own, against itself.

    The file holds each logit as float16, less the largest one of its position.  The likeliest tokens are near 0, where
    float16 is most exact.  The mean KL divergence of a window changes by less than 1e-5 nats (docs/log.md).

    Args:
        side: the float32 model.
        windows: token ids of each window.
        progress: called with the number of windows that are done, and of all windows.
    """

    def __init__(self, side: Side, windows: Windows, progress: StageReport) -> None:
        self.windows = windows
        self.scores = Scores()
        self._folder = TemporaryDirectory(prefix="mbq-compare-")
        file = Path(self._folder.name) / "logits.f16"
        self._stored: list[NDArray[np.float16]] = []
        offset = 0
        for done, window in enumerate(windows, 1):
            logits, bits = side.forward(window)
            expected = logits[:-1]
            kept = np.maximum(expected - expected.max(axis=1, keepdims=True), _LOWEST).astype(np.float16)
            with file.open("ab") as sink:
                kept.tofile(sink)
            self._stored.append(np.memmap(file, np.float16, "r", offset, kept.shape))
            offset += kept.nbytes
            _append(self.scores, window, expected, expected, bits)
            progress(done, len(windows))

    def measure(self, side: Side, progress: StageReport) -> Scores:
        """The scores of every window.

        Args:
            side: what is measured.
            progress: called with the number of windows that are done, and of all windows.
        """
        scores = Scores()
        for done, (window, stored) in enumerate(zip(self.windows, self._stored, strict=True), 1):
            logits, bits = side.forward(window)
            _append(scores, window, logits[:-1], stored.astype(np.float32), bits)
            progress(done, len(self.windows))
        return scores

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stored.clear()
        self._folder.cleanup()


def _append(
    scores: Scores, window: Sequence[int], found: NDArray[np.float32], expected: NDArray[np.float32], bits: float
) -> None:
    """found, expected: logits float32 [S - 1, V] of tokens 1 to S - 1."""
    tokens = compare_tokens(found, expected, window[1:])
    scores.nll.append(float(tokens.nll.mean()))
    scores.divergence.append(float(tokens.divergence.mean()))
    scores.agreement.append(float(tokens.same_top.mean()))
    scores.bits.append(bits)
    scores.token_divergence.append(tokens.divergence)
