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
"""Positions in a block of cached keys."""

PAGE_BYTES = 4096
"""Large tensors start at a multiple of this. A mapped file then loads only the pages that are read."""
