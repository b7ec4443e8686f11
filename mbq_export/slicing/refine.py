"""Refinement of nested slices, group by group: first scale and offset, then codes, while all other groups stay.

It minimises ``sum over depths e of weight_e * tr((W - Q_e) H (W - Q_e).T)``: the error of the layer's output at every
depth.  Scale and offset have a closed form (two unknowns a row and group).  A code is the best of few candidates.
Both steps only lower the sum, up to rounding to stored scales.  Error feedback cannot do this, because it fixes a
weight before it knows how the weights after it are rounded.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from mbq_runtime.bundle.layout import SCALE_STEPS, ZERO_STEPS
from mbq_runtime.bundle.slice_profile import SliceProfile

from ..format.codes import F32, LARGEST_CODE, Sliced, joined, with_scales
from ..model.blocks import fast_dtype
from .columns import DEEP, Grid, settle
from .nested import damped

ROWS = 4096
"""Rows that are refined together.  A group of their columns fits the processor's cache."""


def refine(
    weight: F32,
    hessian: torch.Tensor,
    sliced: Sliced,
    profile: SliceProfile,
    sweeps: int,
    *,
    kept_bits: int = 0,
    deep: float = DEEP,
) -> Sliced:
    """Better slices of a weight matrix.

    Args:
        weight: float32 [N, K].
        hessian: [K, K], second moments of the layer's inputs.  Its device does the work.
        sliced: slices of the weight.
        profile: the bits of each slice.
        sweeps: passes over all groups.
        kept_bits: how many of each code's first bits are kept.  If it is not 0, scales and offsets are kept too.
        deep: how much more deep depths count; see ``columns.DEEP``.
    """
    curvature = damped(hessian).float()
    parts = [
        _refine_rows(
            torch.from_numpy(weight[rows]).to(hessian.device).T.contiguous(),
            curvature,
            sliced.rows(rows),
            Grid(profile, kept_bits, hessian.device, deep),
            sweeps,
            kept_bits,
        )
        for rows in (slice(start, start + ROWS) for start in range(0, len(weight), ROWS))
    ]
    return joined(parts)


def _refine_rows(
    weight: torch.Tensor, curvature: torch.Tensor, sliced: Sliced, grid: Grid, sweeps: int, kept_bits: int
) -> Sliced:
    """weight: float32 [K, N]."""
    device = weight.device
    # A copy even of a single row, whose transpose is the same memory.
    codes = torch.from_numpy(sliced.codes).to(device).T.clone(memory_format=torch.contiguous_format)
    scale, offset, row_scale = (
        torch.from_numpy(values.T.astype(np.float32)).to(device).contiguous()
        for values in (sliced.scale, sliced.offset, sliced.row_scale[:, -1])
    )
    size = len(codes) // len(scale)

    groups = [(g, slice(g * size, (g + 1) * size)) for g in range(len(scale))]
    values = [grid.in_base_cells(codes[group]) for _, group in groups]
    error = torch.cat([weight[group] - (scale[g] * values[g] + offset[g]) for g, group in groups], dim=1)
    # Rounded copies for the large product.  Where the device has no faster numbers, these are no copies.
    fast = fast_dtype(device)
    rounded_curvature, rounded_error = curvature.to(fast), error.to(fast)
    for _ in range(sweeps):
        for g, group in groups:
            own = curvature[group, group]
            # Minus half the gradient of the sum by each value of the group, [E, group, N].
            pull = (rounded_curvature[group] @ rounded_error).float()
            if not kept_bits:
                found = _best_affine(values[g], own, pull, grid.counts, scale[g], offset[g])
                scale[g], offset[g] = _stored(*found, row_scale)
                fitted = weight[group] - (scale[g] * values[g] + offset[g])
                pull += own @ (fitted - error[:, group])
            settle(grid, codes[group], values[g], curvature=own, scale=scale[g], pull=pull)
            error[:, group] = weight[group] - (scale[g] * values[g] + offset[g])
            rounded_error[:, group] = error[:, group]
    kept = replace(sliced, codes=codes.T.contiguous().cpu().numpy())
    return kept if kept_bits else with_scales(kept, scale.T.cpu().numpy(), offset.T.cpu().numpy())


def _stored(scale: torch.Tensor, offset: torch.Tensor, row_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and offsets of a group, float32 [N], as the format holds them (``format.codes.with_scales``)."""
    unit = row_scale / SCALE_STEPS
    scale = (scale / unit).round().clamp(1, LARGEST_CODE).mul(unit).nan_to_num(0.0)
    zero = (-offset / scale * ZERO_STEPS).round().clamp(0, LARGEST_CODE).nan_to_num(0.0)
    return scale, -scale * (zero / ZERO_STEPS)


def _best_affine(
    cells: torch.Tensor, own: torch.Tensor, pull: torch.Tensor, counts: torch.Tensor, scale: torch.Tensor,
    offset: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The best scale and offset [N] of a group for its codes.

    cells: [E, group, N], values in base cells; own: [group, group]; pull: [E, group, N].
    """
    bent = own @ cells
    scale_scale = (counts * (cells * bent).sum(1)).sum(0)
    scale_offset = (counts * bent.sum(1)).sum(0)
    offset_offset = counts.sum() * own.sum()
    by_scale = (counts * (cells * pull).sum(1)).sum(0)
    by_offset = (counts * pull.sum(1)).sum(0)
    determinant = scale_scale * offset_offset - scale_offset**2
    # If all weights of a group share a cell, scale and offset are not determined.
    sound = determinant > 1e-6 * scale_scale * offset_offset
    change = torch.where(sound, (by_scale * offset_offset - by_offset * scale_offset) / determinant, 0.0)
    shift = torch.where(sound, (by_offset * scale_scale - by_scale * scale_offset) / determinant, 0.0)
    # A scale stays positive, and large enough for its cells.
    usable = scale + change > 0.1 * scale
    return (
        torch.where(usable, scale + change, scale),
        torch.where(usable, offset + shift, offset),
    )
