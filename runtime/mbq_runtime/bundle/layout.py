"""Numbers of the stored layouts. The exporter, the kernels and the device's reader share them.

``mbq_targets.build`` passes those that C needs to the compiler, in ``mbq_config.h``.
"""

from __future__ import annotations

NATIVE_LAYOUT = "mbq16"
"""Weights as bit planes in blocks of 16 rows, for the kernels of this project."""

PORTABLE_LAYOUT = "nbits"
"""Weights as operands of ONNX Runtime's own MatMulNBits, for machines without a native library."""

ROW_BLOCK = 16
"""Rows of a weight matrix that are stored together. The stored row count is a multiple of it."""

SCALE_STEPS = 256
"""Steps of a group's 8-bit scale that make the row's factor."""

ZERO_STEPS = 64
"""Steps of a group's 8-bit zero that make one scale."""

KEY_LANES = 16
"""Positions in a block of cached keys, and of cached values of 8 bits."""

KV_SCALE_BYTES = 4
"""Bytes of the scale that a head's cached key or value of 8 bits has."""


def kv_row_bytes(head_dim: int, kv_bits: int) -> int:
    """Bytes of a cached key or value of one token and head.

    Args:
        head_dim: its numbers.
        kv_bits: 32 for float32, or 8.
    """
    return 4 * head_dim if kv_bits == 32 else head_dim + KV_SCALE_BYTES


def whole_blocks(tokens: int) -> int:
    """The room of a cache in whole blocks, in tokens.

    Args:
        tokens: that it must hold.
    """
    return -(-tokens // KEY_LANES) * KEY_LANES


PAGE_BYTES = 4096
"""Large tensors start at a multiple of this. A mapped file then loads only the pages that are read."""
