"""Slicing by rounding to nearest: it needs no data and takes seconds.

The base quantiser has four cells between a group's minimum and maximum.  With three steps between four points the top
cell would stay nearly empty, and every depth would lose a third.  Nothing is clipped, because residual slices cannot
represent what a clip cuts off.
"""

from __future__ import annotations

import numpy as np

from mbq_runtime.errors import ModelError

from ..format.codes import F16, F32, Sliced, encode

_LARGEST = float(np.finfo(np.float16).max)


def _toward(values: F32, limit: float) -> F16:
    """float16 of ``values``, rounded toward ``limit`` (an infinity) and not to nearest."""
    rounded = values.astype(np.float16)
    off = rounded.astype(np.float32) < values if limit > 0 else rounded.astype(np.float32) > values
    return np.where(off, np.nextafter(rounded, np.float16(limit)), rounded)


def group_range(weights: F32, name: str) -> tuple[F16, F16]:
    """The scale and offset whose four base cells hold every weight of a group.

    Args:
        weights: float32 [..., group].
        name: of the layer, for errors.

    Returns:
        float16 [...] scales, and float16 [...] offsets.

    Raises:
        ModelError: a weight is outside the range of float16 offsets.
    """
    low, high = weights.min(axis=-1), weights.max(axis=-1)
    largest = float(max(-low.min(), high.max()))
    if not largest <= _LARGEST:  # also when it is not a number
        raise ModelError(f"{name}: a weight of {largest:g} is beyond the {_LARGEST:g} that a group's offset can hold")
    # Round outward, so that both ends of the range stay inside the cells.
    offset = _toward(low, -np.inf)
    return _toward((high - offset.astype(np.float32)) / np.float32(4), np.inf), offset


def slice_weight(weight: F32, group_size: int, name: str) -> Sliced:
    """Slices of a weight matrix, each weight rounded to nearest.

    Args:
        weight: float32 [N, K].
        group_size: weights that share a scale; it divides K.
        name: of the layer, for errors.

    Raises:
        ModelError: a weight is outside the range of float16 offsets.
    """
    n, k = weight.shape
    scale, offset = group_range(weight.reshape(n, k // group_size, group_size), name)
    return Sliced(encode(weight, scale, offset), scale, offset)
