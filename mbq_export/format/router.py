"""The router: scores of a token, and the depth that a budget gives it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mbq_targets.constants import MEAN_SQUARE_EPS

from .codes import F16, F32, F64, I32


@dataclass(frozen=True)
class RouterParams:
    """Parameters of one router for E depths.  Only the learned router has w1, b1 and w2.

    bias: float32 [E - 1].
    norm_gain: float32 [E - 1].
    budgets: float32 [T], average bits, ascending.
    thresholds: float32 [T], one for each budget.
    w1: float16 [H, K], or None.
    b1: float32 [H], or None.
    w2: float32 [E - 1, H], or None.
    """

    bias: F32
    norm_gain: F32
    budgets: F32
    thresholds: F32
    w1: F16 | None = None
    b1: F32 | None = None
    w2: F32 | None = None

    @property
    def bytes(self) -> int:
        """Bytes that a token reads: all parameters but the table, which all units share."""
        parts = (self.bias, self.norm_gain, self.w1, self.b1, self.w2)
        return sum(part.nbytes for part in parts if part is not None)


def router_scores(x: F32, router: RouterParams) -> F64:
    """Scores of the slices above the first.

    ``score = bias + norm_gain * log(ms) + w2 @ silu(w1 @ (x / sqrt(ms)) + b1)`` with ``ms = mean(x**2) + 1e-12``.
    Without w1 the last term is absent: the norm rule.

    Args:
        x: float32 [M, K], the router's input.
        router: its parameters.

    Returns:
        float64 [M, E - 1].
    """
    wide = x.astype(np.float64)
    ms = np.einsum("mk,mk->m", wide, wide)[:, None] / wide.shape[1] + MEAN_SQUARE_EPS
    scores = router.bias.astype(np.float64) + router.norm_gain.astype(np.float64) * np.log(ms)
    if router.w1 is not None:
        assert router.b1 is not None
        assert router.w2 is not None
        pre = wide @ router.w1.astype(np.float64).T / np.sqrt(ms) + router.b1.astype(np.float64)
        scores = scores + (pre / (1 + np.exp(-pre))) @ router.w2.astype(np.float64).T
    return np.asarray(scores)


def threshold_at(avg_bits: float, router: RouterParams) -> float:
    """The threshold for a budget: linear between the entries of the table.

    Args:
        avg_bits: the budget, average bits per weight.
        router: the parameters that hold the table.
    """
    return float(np.interp(avg_bits, router.budgets, router.thresholds))


def route(x: F32, avg_bits: float, router: RouterParams, deepest: int | None = None) -> I32:
    """Op ``Router``: the depth of each token.

    Depth is one more than the number of leading scores above the threshold, so only prefixes of slices occur.
    At or below the first budget every token gets depth 1, at or above the last one depth E.

    Args:
        x: float32 [M, K], the router's input.
        avg_bits: the budget, average bits per weight.
        router: its parameters.
        deepest: the most that a depth may be; None for E.

    Returns:
        int32 [M], depths of 1 to E.
    """
    scores = router_scores(x, router)
    if avg_bits <= router.budgets[0]:
        depth = np.ones(len(x), np.int32)
    elif avg_bits >= router.budgets[-1]:
        depth = np.full(len(x), scores.shape[1] + 1, np.int32)
    else:
        depth = 1 + np.cumprod(scores > threshold_at(avg_bits, router), axis=1).sum(axis=1)
    return np.minimum(depth, deepest or scores.shape[1] + 1).astype(np.int32)
