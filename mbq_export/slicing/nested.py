"""Nested slicing: one code per weight, chosen so that the matrix is good at every depth at once.

Columns are rounded one after the other and the error is fed forward into those not yet rounded, as
GPTQ does (arXiv 2210.17323): with ``H`` the mean of ``x x.T`` over the layer's inputs and ``U`` the upper
Cholesky factor of its inverse, rounding column j by an error ``e`` adds ``-e / U[j, j] * U[j, j+1:]`` to
the rest.  A depth that cuts the code shorter makes errors of its own, so each depth has its own stream
of compensated weights.  The code of a weight is the one of least weighted error over all streams among
these: the code nearest to the deepest stream, and, for each shallower depth, the code nearest to the
deepest stream within the cell that this depth would choose by itself.
"""

from __future__ import annotations

import numpy as np
import torch

from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_runtime.errors import ModelError

from ..format.codes import F32, Sliced
from .columns import Grid, feed_back
from .rtn import group_range

DAMPING = 0.01
"""Added to H's diagonal, as a share of its mean."""


def damped(hessian: torch.Tensor) -> torch.Tensor:
    """float64 [K, K]: ``hessian`` with every direction given some curvature."""
    result = hessian.double().clone()
    diagonal = result.diagonal()
    diagonal += DAMPING * diagonal.mean()
    # An input that was never active: any positive curvature leaves its column as it is.
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
    weight: F32, hessian: torch.Tensor, group_size: int, profile: SliceProfile, name: str,
    earlier: Sliced | None = None, kept_bits: int = 0,
) -> Sliced:  # fmt: skip
    """float32 [N, K] and float [K, K] -> Sliced.  K must be a multiple of ``group_size``.

    earlier: slices of which scales, offsets and the first ``kept_bits`` of codes are kept.  Worked on where
    ``hessian`` is.
    Raises ModelError when it is not finite or a weight is beyond the format's range.
    """
    n, k = weight.shape
    factor = _inverse_factor(hessian, name)
    device = hessian.device
    grid = Grid(profile, kept_bits, device)
    # Columns first: a column of all streams is then one stretch of memory.
    streams = torch.from_numpy(weight).to(device).T.contiguous()[None].repeat(profile.depths, 1, 1)
    codes = torch.zeros(k, n, dtype=torch.uint8, device=device)
    if earlier is not None:
        codes.copy_(torch.from_numpy(earlier.codes).T)
    scales, offsets = [], []
    for start in range(0, k, group_size):
        group = slice(start, start + group_size)
        if earlier is None:
            scale16, offset16 = group_range(streams[-1, group].T.cpu().numpy(), name)
        else:
            at = start // group_size
            scale16, offset16 = earlier.scale[:, at], earlier.offset[:, at]
        scales.append(scale16)
        offsets.append(offset16)
        offset = torch.from_numpy(offset16.astype(np.float32)).to(device)
        scale = torch.from_numpy(scale16.astype(np.float32)).to(device)
        errors = feed_back(grid, streams[:, group], factor[group, group], scale, offset, codes[group])
        if group.stop < k:
            streams[:, group.stop :] -= factor[group, group.stop :].T @ errors
    return Sliced(codes.T.contiguous().cpu().numpy(), np.stack(scales, 1), np.stack(offsets, 1))
