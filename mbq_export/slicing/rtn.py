"""Slicing by rounding to nearest: it needs no data and takes seconds.

The base quantiser has four cells between a group's minimum and maximum.  With three steps between four points the top
cell would stay nearly empty, and every depth would lose a third.  Nothing is clipped, because residual slices cannot
represent what a clip cuts off.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mbq_runtime.bundle.layout import ZERO_STEPS
from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_runtime.errors import ModelError

from ..format.codes import F32, Sliced, encode, row_scales, scale_codes, zero_codes

_LARGEST = float(np.finfo(np.float16).max)


def group_range(weights: F32, name: str) -> tuple[F32, F32]:
    """The scale and offset whose four base cells hold zero and every weight of a group.

    Args:
        weights: float32 [..., group].
        name: of the layer, for errors.

    Returns:
        float32 [...] scales, with room for the zero to be rounded up, and float32 [...] offsets.

    Raises:
        ModelError: a weight is outside the range of float16.
    """
    low, high = weights.min(axis=-1), weights.max(axis=-1)
    largest = float(max(-low.min(), high.max()))
    if not largest <= _LARGEST:  # also when it is not a number
        raise ModelError(f"{name}: a weight of {largest:g} is beyond the {_LARGEST:g} that a row's scale can hold")
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    return ((high - low) / np.float32(4 - 1 / ZERO_STEPS)).astype(np.float32), low.astype(np.float32)


def slice_weight(weight: F32, group_size: int, profile: SliceProfile, name: str) -> Sliced:
    """Slices of a weight matrix, each weight rounded to nearest.

    Args:
        weight: float32 [N, K].
        group_size: weights that share a scale; it divides K.
        profile: the bits of each slice.
        name: of the layer, for errors.

    Raises:
        ModelError: a weight is outside the range of float16.
    """
    n, k = weight.shape
    scale, offset = group_range(weight.reshape(n, k // group_size, group_size), name)
    row_scale = row_scales(scale.max(axis=1))
    empty = Sliced(
        np.zeros(weight.shape, np.uint8),
        scale_codes(scale, row_scale, up=True),
        np.zeros(scale.shape, np.uint8),
        row_scale,
    )
    ranged = replace(empty, zero_codes=zero_codes(offset, empty.scale, up=True))
    return replace(ranged, codes=encode(weight, ranged.scale, ranged.offset, profile))
