"""How far a model is from the original that it was made of: KL divergence and the share of the same first choice.

At each position of a text, p is the original's distribution over the next token and q is the other model's::

    divergence = sum over tokens t of p(t) * (log p(t) - log q(t)), in nats
    same top   = the most likely token of q is that of p

Of equally likely tokens the one with the lowest id is the first choice, as in greedy decoding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_ROWS = 32
"""Rows that are converted at a time.  They bound the memory with a large vocabulary."""


class TokenFidelity(NamedTuple):
    """How well a model follows the original at each position of a text.

    nll: negative log-likelihood of the text's next token in nats, float64 [S].
    divergence: KL divergence from the original in nats, float64 [S].
    same_top: whether both models find the same token most likely, bool [S].
    """

    nll: NDArray[np.float64]
    divergence: NDArray[np.float64]
    same_top: NDArray[np.bool_]


@dataclass(frozen=True)
class Mean:
    """A mean over windows.

    value: the mean.
    stderr: its standard error; None for a single window.
    """

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Divergence:
    """KL divergence from the original over a text, in nats a token.

    mean: over tokens.
    p99: 99 % of the tokens diverge less.
    p999: 99.9 % of the tokens diverge less.
    """

    mean: Mean
    p99: float
    p999: float


def mean(values: Sequence[float]) -> Mean:
    """The mean and its standard error.

    Args:
        values: one for each window, at least one.
    """
    count = len(values)
    value = math.fsum(values) / count
    if count < 2:
        return Mean(value, None)
    return Mean(value, math.sqrt(math.fsum((v - value) ** 2 for v in values) / (count - 1) / count))


def divergence(windows: Sequence[NDArray[np.float64]]) -> Divergence:
    """The statistics of a text.  Percentiles are over the tokens of all windows, with linear interpolation.

    Args:
        windows: KL divergence of each token in nats, an array [S] for each window; at least one window.
    """
    p99, p999 = np.quantile(np.concatenate(list(windows)), (0.99, 0.999))
    return Divergence(mean([float(window.mean()) for window in windows]), float(p99), float(p999))


def compare_tokens(
    logits: NDArray[np.float32], original: NDArray[np.float32], targets: Sequence[int] | NDArray[np.integer]
) -> TokenFidelity:
    """Compare the logits of two models at the positions of a text.

    With z the logarithm of the sum of exp(logits), the divergence is sum(p * (logits_p - logits_q)) - (z_p - z_q).  So
    equal logits give exactly 0.

    Args:
        logits: of the model, float32 [S, V], finite.
        original: of the original model, float32 [S, V], finite.
        targets: ids of the token that follows each position, integers [S], each from 0 to V - 1; at least one.
    """
    ids = np.asarray(targets, np.int64)
    parts = []
    for start in range(0, len(ids), _ROWS):
        rows = slice(start, start + _ROWS)
        parts.append(_compare_rows(logits[rows], original[rows], ids[rows]))
    return TokenFidelity(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _compare_rows(
    logits: NDArray[np.float32], original: NDArray[np.float32], targets: NDArray[np.int64]
) -> TokenFidelity:
    top, original_top = logits.argmax(axis=1), original.argmax(axis=1)
    found, expected = (rows - rows.max(axis=1, keepdims=True) for rows in (logits, original))
    total = np.exp(found).sum(axis=1, dtype=np.float64)
    weights = np.exp(expected)
    original_total = weights.sum(axis=1, dtype=np.float64)
    weights *= expected - found
    gap = weights.sum(axis=1, dtype=np.float64) / original_total
    picked = np.take_along_axis(found, targets[:, None], axis=1)[:, 0]
    nll = np.log(total) - picked
    return TokenFidelity(nll, gap - (np.log(original_total) - np.log(total)), top == original_top)
