"""Nested slicing with error feedback: one code a weight, chosen so that the matrix is good at every depth.

Columns are rounded one after the other.  The error of a column is fed into the columns that are not yet rounded, as
GPTQ does (arXiv 2210.17323).  With ``H`` the mean of ``x x.T`` over the layer's inputs, and ``U`` the upper Cholesky
factor of its inverse, an error ``e`` of column j adds ``-e / U[j, j] * U[j, j+1:]`` to the columns after it.

Each depth cuts the code at another bit, so it has errors of its own, and its own stream of compensated weights.  A
weight gets the code with the least weighted error over all streams.  The candidates are the code nearest to the
deepest stream, and for each shallower depth the code nearest to the deepest stream within the cell that this depth
alone would choose.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_runtime.errors import ModelError

from ..format.codes import F32, Sliced, row_scales, scale_codes, zero_codes
from ..model.blocks import fast_products
from .columns import DEEP, Grid, feed_back
from .rtn import group_range

_ROOM = 1.125
"""Row factors hold scales this many times the largest one, because feedback and tuning enlarge some."""
DAMPING = 0.2
"""Added to the diagonal of H, as a share of the diagonal's mean.  It is large, because H is known from few tokens: with
less, codes fit the calibration text and not others (docs/log.md)."""
TIED_DAMPING = 1.0
"""The same, in addition, for a head whose rows serve as the embedding too.  There every change of a weight counts."""


def damped(hessian: torch.Tensor, share: float = DAMPING) -> torch.Tensor:
    """Add some curvature to every direction.

    Args:
        hessian: [K, K], second moments of a layer's inputs.
        share: how much, in means of the diagonal.

    Returns:
        float64 [K, K].
    """
    result = hessian.double().clone()
    diagonal = result.diagonal()
    diagonal += share * diagonal.mean()
    # An input that was never active gets any positive curvature: its column then stays as it is.
    diagonal[diagonal == 0] = 1.0
    return result


def _inverse_factor(hessian: torch.Tensor, name: str) -> torch.Tensor:
    """float32 [K, K]: the upper Cholesky factor of the damped inverse."""
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(hessian)))
        factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    except RuntimeError:  # torch.linalg's own error is one
        raise ModelError(
            f"{name}: its inputs on the calibration text have no usable covariance; use more --calib-tokens"
        ) from None
    return factor


def slice_weight(
    weight: F32,
    hessian: torch.Tensor,
    group_size: int,
    profile: SliceProfile,
    name: str,
    *,
    earlier: Sliced | None = None,
    kept_bits: int = 0,
    deep: float = DEEP,
) -> Sliced:
    """Slices of a weight matrix, by error feedback over all depths.

    Args:
        weight: float32 [N, K].
        hessian: [K, K], second moments of the layer's inputs.  Its device does the work.
        group_size: weights that share a scale; it divides K.
        profile: the bits of each slice.
        name: of the layer, for errors.
        earlier: slices whose scales, offsets and first ``kept_bits`` are kept, or None.
        kept_bits: how many of each code's first bits are kept.
        deep: how much more deep depths count; see ``columns.DEEP``.

    Raises:
        ModelError: the second moments are not positive definite, or a weight is beyond the format's range.
    """
    n, k = weight.shape
    factor = _inverse_factor(hessian, name)
    device = hessian.device
    grid = Grid(profile, kept_bits, device, deep)
    # Columns first: then a column of all rows is contiguous.
    streams = torch.from_numpy(weight).to(device).T.contiguous()[None].repeat(grid.depths, 1, 1)
    codes = torch.zeros(k, n, dtype=torch.uint8, device=device)
    if earlier is not None:
        codes.copy_(torch.from_numpy(earlier.codes).T)
    scaled = _ranged(weight, group_size, profile, name) if earlier is None else earlier
    for start in range(0, k, group_size):
        group, at = slice(start, start + group_size), slice(start // group_size, start // group_size + 1)
        # Views: what is written to them is written to ``scaled``.
        of_group = replace(scaled, scale_codes=scaled.scale_codes[:, at], zero_codes=scaled.zero_codes[:, at])
        if earlier is None:
            low_scale, low = group_range(streams[-1, group].T.cpu().numpy()[:, None], name)
            of_group.scale_codes[:] = scale_codes(low_scale, scaled.row_scale, up=True)
            of_group.zero_codes[:] = zero_codes(low, of_group.scale, up=True)
        scale, offset = (
            torch.from_numpy(values[:, 0].copy()).to(device) for values in (of_group.scale, of_group.offset)
        )
        errors = feed_back(grid, streams[:, group], factor[group, group], codes[group], scale=scale, offset=offset)
        if group.stop < k:
            with fast_products(device):
                for stream, of_stream in zip(streams, errors, strict=True):
                    stream[group.stop :].addmm_(factor[group, group.stop :].T, of_stream, alpha=-1)
    return replace(scaled, codes=codes.T.contiguous().cpu().numpy())


def _ranged(weight: F32, group_size: int, profile: SliceProfile, name: str) -> Sliced:
    """A matrix [N, K] of zeros with factors for its rows, and no scales yet."""
    n, k = weight.shape
    scale, _ = group_range(weight.reshape(n, k // group_size, group_size), name)
    codes, scales, zeros = (np.zeros((n, columns), np.uint8) for columns in (k, scale.shape[1], scale.shape[1]))
    return Sliced(codes, scales, zeros, row_scales(scale.max(axis=1) * np.float32(_ROOM), profile))
