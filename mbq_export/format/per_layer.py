"""Per-layer embeddings between their linear layers, in numpy: the definition that every engine is tested against.

A token has, beside its embedding, a row of a table with a part for each block.  A block adds its part to what the
embedding gives it, and gates the sum::

    out = activation(gate) * (given / sqrt(mean(given**2) + eps) * gain + rows)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .codes import F32, F64


def per_layer(gate: F32, given: F32, rows: F32, gain: F32, *, eps: float, gated: Callable[[F32], F64]) -> F64:
    """What a block takes of the per-layer embeddings, before its last projection.

    Args:
        gate: float32 [tokens, size], before its activation.
        given: float32 [tokens, size], what the embedding of the token gives, before its norm.
        rows: float32 [tokens, size], the block's part of each token's row, with its factor.
        gain: float32 [size], what the norm multiplies by.
        eps: added to the mean square.
        gated: ``ops.gated_silu`` or ``ops.gated_gelu``.

    Returns:
        float64 [tokens, size].
    """
    normed = given / np.sqrt(np.mean(given.astype(np.float64) ** 2, axis=-1, keepdims=True) + eps) * gain
    return gated(np.concatenate([gate, (normed + rows).astype(np.float32)], axis=-1))
