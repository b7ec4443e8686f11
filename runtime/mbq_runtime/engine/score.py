"""Negative log-likelihood from logits, and how many logits are held at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SCORING_LOGITS_BYTES = 32 << 20
"""Bound on the float32 logits of one pass of scoring, where every token of the pass has logits."""

_MIN_CHUNK = 16  # tokens
_ROWS = 64  # bounds the temporary exponentials


def scoring_chunk(vocab_size: int, prompt_chunk: int) -> int:
    """Tokens of one pass of scoring: as many as keep the logits within SCORING_LOGITS_BYTES, a power of two.

    Args:
        vocab_size: logits of a token.
        prompt_chunk: most tokens of any pass; the result is never higher.

    >>> scoring_chunk(49152, 512), scoring_chunk(262144, 128), scoring_chunk(262144, 8)
    (128, 32, 8)
    """
    tokens = max(SCORING_LOGITS_BYTES // (4 * vocab_size), _MIN_CHUNK)
    return min(prompt_chunk, 1 << tokens.bit_length() - 1)


def mean_nll(logits: NDArray[np.float32], targets: NDArray[np.integer]) -> float:
    """Mean over rows of ``logsumexp(logits[i]) - logits[i, targets[i]]``, in nats.

    Args:
        logits: float32 [S, V].
        targets: integers [S], each from 0 to V - 1.

    >>> round(mean_nll(np.zeros((2, 4), np.float32), np.array([0, 3])), 4)  # log(4): all four are as likely
    1.3863
    """
    total = 0.0
    for start in range(0, len(targets), _ROWS):
        rows = logits[start : start + _ROWS]
        peak = rows.max(axis=1, keepdims=True)
        norm = np.log(np.exp(rows - peak).sum(axis=1, dtype=np.float64)) + peak[:, 0]
        picked = np.take_along_axis(rows, np.asarray(targets[start : start + _ROWS])[:, None].astype(np.int64), axis=1)
        total += float((norm - picked[:, 0]).sum())
    return total / len(targets)
