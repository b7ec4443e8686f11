"""Negative log-likelihood from logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROWS = 64  # bounds the temporary exponentials


def mean_nll(logits: NDArray[np.float32], targets: NDArray[np.integer]) -> float:
    """Mean over rows of ``logsumexp(logits[i]) - logits[i, targets[i]]``, in nats.

    logits: float32 [S, V]; targets: integers [S].
    """
    total = 0.0
    for start in range(0, len(targets), _ROWS):
        rows = logits[start : start + _ROWS]
        peak = rows.max(axis=1, keepdims=True)
        norm = np.log(np.exp(rows - peak).sum(axis=1, dtype=np.float64)) + peak[:, 0]
        picked = np.take_along_axis(rows, np.asarray(targets[start : start + _ROWS])[:, None].astype(np.int64), axis=1)
        total += float((norm - picked[:, 0]).sum())
    return total / len(targets)
