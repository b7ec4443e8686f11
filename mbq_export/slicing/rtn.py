"""Slicing by rounding to nearest: it needs no data and takes seconds.

The base quantiser has four cells between a group's minimum and maximum.  With three steps between four points the top
cell would stay nearly empty, and every depth would lose a third.  Nothing is clipped, because residual slices cannot
represent what a clip cuts off.
"""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np

from mbq_runtime.bundle.layout import ZERO_STEPS
from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_runtime.errors import ModelError

from ..format.codes import F32, Sliced, encode, joined, row_scales, scale_codes, zero_codes
from ..memory import TABLE_WEIGHTS_AT_ONCE
from ..model.checkpoint import Checkpoint
from ..model.shape import Unit

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


def slice_table(table: F32, group_size: int, profile: SliceProfile, name: str) -> Sliced:
    """Slices of a matrix that may be larger than memory, some rows at a time.

    Args:
        table: float32 [N, K], such as one that is mapped from a file.
        group_size: weights that share a scale; it divides K.
        profile: the bits of each slice.
        name: of the table, for errors.

    Returns:
        What ``slice_weight`` returns for all rows.

    Raises:
        ModelError: a weight is outside the range of float16.
    """
    n, k = table.shape
    of_groups, of_rows = np.empty((n, k // group_size), np.uint8), np.empty((n, profile.depths), np.float16)
    sliced = Sliced(np.empty(table.shape, np.uint8), of_groups, of_groups.copy(), of_rows)
    step = max(1, TABLE_WEIGHTS_AT_ONCE // k)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        some = slice_weight(table[rows], group_size, profile, name)
        for field in fields(Sliced):
            getattr(sliced, field.name)[rows] = getattr(some, field.name)
    return sliced


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
    row_scale = row_scales(scale.max(axis=1), profile)
    empty = Sliced(
        np.zeros(weight.shape, np.uint8),
        scale_codes(scale, row_scale, up=True),
        np.zeros(scale.shape, np.uint8),
        row_scale,
    )
    ranged = replace(empty, zero_codes=zero_codes(offset, empty.scale, up=True))
    return replace(ranged, codes=encode(weight, ranged.scale, ranged.offset, profile))


def slice_unit(checkpoint: Checkpoint, unit: Unit, group_size: int, profile: SliceProfile) -> Sliced:
    """Slices of the stacked layers of a unit, one layer at a time: a unit of experts has hundreds.

    Args:
        checkpoint: the model.
        unit: one of its units.
        group_size: weights that share a scale; it divides K.
        profile: the bits of each slice.

    Raises:
        ModelError: a weight is outside the range of float16.
    """
    weights = (layer.weight.detach().cpu().numpy() for layer, _ in checkpoint.layers(unit))
    return joined([slice_weight(weight, group_size, profile, unit.name) for weight in weights])
