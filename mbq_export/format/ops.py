"""The ops on codes: products with rounded activations, rows of a table, and the gates.  The router is in ``router``."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_targets.constants import LOW_BITS, SMALLEST_ACTIVATION

from .codes import F32, F64, I32, Sliced, decode

LOW_BYTES = 1 << LOW_BITS
"""Steps of an activation's low byte that make one of its high byte."""


def quantize_activations(x: F32, group_size: int, bits: int = 16) -> tuple[NDArray[np.int16], F32]:
    """Round activations to symmetric integers, with one step a token and group.

    Let ``t = x * (127 / max|x|)``.  An integer of 8 bits is ``rint(t)`` in steps of ``max|x| / 127``.  One of 16 bits
    is ``256 * high + low`` in steps of ``max|x| / 32512``, with ``high = rint(t)`` and
    ``low = rint(256 * (t - high))``.  Both bytes are clipped to -127 to 127, because the dot products of processors
    take bytes.  Ties go to even.  A group whose maximum is below 1e-30 counts as zero.

    Args:
        x: float32 [M, K].
        group_size: values that share a step.
        bits: 8 or 16.

    Returns:
        int16 [M, K] integers, and their float32 [M, K / group_size] steps.
    """
    m, k = x.shape
    groups = x.reshape(m, k // group_size, group_size).astype(np.float32)
    peak = np.abs(groups).max(axis=2)
    peak = np.where(peak >= np.float32(SMALLEST_ACTIVATION), peak, np.float32(0))
    step = (peak / np.float32(127 if bits == 8 else LOW_BYTES * 127)).astype(np.float32)
    inverse = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > 0)
    scaled = groups * inverse[:, :, None]
    high = np.rint(scaled)
    if bits == 8:
        return high.astype(np.int16).reshape(m, k), step
    low = np.clip(np.rint((scaled - high) * np.float32(LOW_BYTES)), -127, 127)
    return (high * LOW_BYTES + low).astype(np.int16).reshape(m, k), step


def round_activations(x: F32, group_size: int, bits: int = 16) -> F64:
    """The values that a sliced product multiplies: activations, rounded.

    Args:
        x: float32 [M, K].
        group_size: values that share a step.
        bits: 8 or 16.

    Returns:
        float64 [M, K].
    """
    q, step = quantize_activations(x, group_size, bits)
    return q.astype(np.float64) * np.repeat(step.astype(np.float64), group_size, axis=1)


def sliced_matmul(x: F32, depth: I32, sliced: Sliced, profile: SliceProfile, activation_bits: int = 16) -> F64:
    """Op ``SlicedMatMul``: row m is ``x'[m] @ w(depth[m]).T`` with x' of ``round_activations``.

    Args:
        x: float32 [M, K].
        depth: int32 [M], 1-based.
        sliced: a matrix [N, K].
        profile: the bits of each slice.
        activation_bits: 8 or 16.

    Returns:
        float64 [M, N].
    """
    restored = round_activations(x, sliced.group_size, activation_bits)
    y = np.zeros((x.shape[0], sliced.codes.shape[0]))
    for d in np.unique(depth):
        rows = depth == d
        y[rows] = restored[rows] @ decode(sliced, profile, int(d)).T
    return y


def sliced_gather(indices: NDArray[np.int64], sliced: Sliced, profile: SliceProfile, depth: int) -> F64:
    """Op ``SlicedGather``: rows of a table at a depth.

    Args:
        indices: int64 [M], which rows.
        sliced: the table [N, K].
        profile: the bits of each slice.
        depth: 1-based.

    Returns:
        float64 [M, K].
    """
    return decode(sliced.rows(indices), profile, depth)


def gated_silu(x: F32) -> F64:
    """Op ``GatedSilu``: SiLU of the first half times the second half.

    Args:
        x: float32 [..., 2 F].

    Returns:
        float64 [..., F].
    """
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    return np.asarray(gate / (1 + np.exp(-gate)) * up)


def gated_gelu(x: F32) -> F64:
    """Op ``GatedGelu``: the tanh form of GELU of the first half, times the second half.

    Args:
        x: float32 [..., 2 F].

    Returns:
        float64 [..., F].
    """
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
    return np.asarray(0.5 * gate * (1 + np.tanh(inner)) * up)
