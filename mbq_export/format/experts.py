"""Experts: which ones a token takes, and the op that multiplies a token by their rows alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mbq_targets.spec import Experts, KernelSpec

from .codes import F32, F64, I32, Sliced
from .ops import sliced_matmul


def choose_experts(x: F32, chooser: F32, shape: Experts, bias: F32 | None = None) -> tuple[NDArray[np.int64], F64]:
    """The experts that each token takes, and the weights of their outputs.

    The scores of the experts are ``x @ chooser.T``.  Their shares are the softmax of the scores, or their sigmoids.  A
    token takes the experts of the largest ``share + bias``.  The weights are the shares of these experts.

    Args:
        x: float32 [M, hidden], the input of the block.
        chooser: float32 [experts, hidden], scores the experts.
        shape: how many a token takes, and what is done with their weights.
        bias: float32 [experts], or None for nothing.

    Returns:
        int64 [M, used], the best first, and float64 [M, used].
    """
    scores = x.astype(np.float64) @ chooser.T.astype(np.float64)
    if shape.sigmoid:
        shares = 1 / (1 + np.exp(-scores))
    else:
        odds = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares = odds / odds.sum(axis=1, keepdims=True)
    chosen = np.argsort(-(shares if bias is None else shares + bias), axis=1, kind="stable")[:, : shape.used]
    weights = np.take_along_axis(shares, chosen, axis=1)
    if shape.normed:
        weights = weights / (weights.sum(axis=1, keepdims=True) + shape.sum_eps)
    return chosen, weights * shape.scale


def experts_matmul(x: F32, chosen: NDArray[np.int64], depth: I32, experts: Sequence[Sliced], spec: KernelSpec) -> F64:
    """Op ``ExpertsMatMul``: each token by the matrices of the experts that it takes, all at its depth.

    Args:
        x: float32 [M, K], or [M, used, K] with an input for each expert of a token.
        chosen: int64 [M, used], the experts of each token.
        depth: int32 [M], 1-based.
        experts: their matrices, each [N, K].
        spec: slices and activation bits.

    Returns:
        float64 [M, used, N].
    """
    inputs = np.broadcast_to(x[:, None] if x.ndim == 2 else x, (*chosen.shape, x.shape[-1]))
    y = np.zeros((*chosen.shape, len(experts[0].codes)))
    for at in np.unique(chosen):
        tokens, places = np.nonzero(chosen == at)
        y[tokens, places] = sliced_matmul(
            inputs[tokens, places], depth[tokens], experts[at], spec.profile, spec.activation_bits
        )
    return y
