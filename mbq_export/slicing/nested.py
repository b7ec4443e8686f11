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

from mbq_runtime.errors import ModelError
from mbq_runtime.profile import CODE_BITS, SliceProfile

from .reference import F32, Sliced
from .rtn import group_range

DAMPING = 0.01
"""Added to H's diagonal, as a share of its mean."""


def depth_weights(profile: SliceProfile, kept_bits: int = 0) -> tuple[float, ...]:
    """How much a depth's error counts: the deep end most, whose cells are the smallest.

    The more so where the first bits of codes are kept, and with them the shallow end.
    """
    return tuple(2.0 ** ((bits - 3) / (1.25 if kept_bits else 2.5)) for bits in profile.depth_bits)


def damped(hessian: torch.Tensor) -> torch.Tensor:
    """float64 [K, K]: ``hessian`` with every direction given some curvature."""
    result = hessian.double().clone()
    diagonal = result.diagonal()
    diagonal += DAMPING * diagonal.mean()
    # An input that was never active: any positive curvature leaves its column as it is.
    diagonal[diagonal == 0] = 1.0
    return result


class Grid:
    """The cells of every depth, and how a code is chosen among them.  Its tensors are float32 [E, 1] on ``device``.

    steps: the width of a cell in cells of the base quantiser; counts: how much a depth's error counts; kept_bits: so
    many of a code's first bits are never changed.
    All steps and cells are powers of two: their inverses are exact, and a product is quicker than a quotient.
    """

    def __init__(self, profile: SliceProfile, kept_bits: int, device: torch.device) -> None:
        steps = [2.0 ** (2 - bits) for bits in profile.depth_bits]
        cells = [2.0 ** (CODE_BITS - bits) for bits in profile.depth_bits]
        of_each = torch.tensor([steps, cells, depth_weights(profile, kept_bits)]).to(device)[:, :, None]
        self.steps, self._cells, self.counts = of_each[0], of_each[1], of_each[2]
        self._per_step, self._per_cell = 1 / self.steps, 1 / self._cells
        # Of the codes to choose from: how many, where the first and the last cell begin, and how far their ends are.
        self._span = float(1 << (CODE_BITS - kept_bits))
        self._first, self._last = torch.zeros_like(self._cells), self._span - self._cells
        self._within = self._cells - 1
        self._kept = kept_bits > 0

    def in_base_cells(self, codes: torch.Tensor) -> torch.Tensor:
        """float32 codes [..., 1, N] or [N] -> their values at every depth, [..., E, N], in cells of the base."""
        values: torch.Tensor = (codes * self._per_cell).floor_().add_(0.5).mul_(self.steps)
        return values

    def columns_in_base_cells(self, codes: torch.Tensor) -> torch.Tensor:
        """float32 codes [columns, N] -> as ``in_base_cells``, but [E, columns, N]."""
        values: torch.Tensor = (codes * self._per_cell[:, :, None]).floor_().add_(0.5).mul_(self.steps[:, :, None])
        return values

    def best_code(self, wanted: torch.Tensor, code: torch.Tensor, candidate: bool) -> torch.Tensor:
        """float32 [N] codes for float32 [E, N] wanted values, in cells of the base.

        code: float32 [N], what each has had so far; candidate: whether it may stay.
        """
        first = (wanted * self._per_step).floor_().mul_(self._cells)
        if self._kept:
            lowest = (code / self._span).floor_().mul_(self._span)
            # In this order: a cell may be wider than the span, and then begins no later.
            first = torch.maximum(torch.minimum(first, lowest + self._last, out=first), lowest, out=first)
        else:
            first.clamp_(self._first, self._last)
        # A cell of the deepest depth is one code.
        finest = first[-1]
        candidates = torch.minimum(torch.maximum(finest, first), first + self._within)
        if candidate:
            candidates = torch.cat([candidates, code[None]])
        cost = self.in_base_cells(candidates[:, None]).sub_(wanted).square_().mul_(self.counts).sum(1)
        return candidates.gather(0, cost.argmin(0, keepdim=True))[0]


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
        current, u = streams[:, group].clone(), factor[group, group]
        if earlier is None:
            scale16, offset16 = group_range(current[-1].T.cpu().numpy(), name)
        else:
            at = start // group_size
            scale16, offset16 = earlier.scale[:, at], earlier.offset[:, at]
        scales.append(scale16)
        offsets.append(offset16)
        offset = torch.from_numpy(offset16.astype(np.float32)).to(device)
        scale = torch.from_numpy(scale16.astype(np.float32)).to(device)
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        errors = torch.empty_like(current)
        for j in range(group_size):
            wanted = (current[:, j] - offset) * inverse
            code = grid.best_code(wanted, codes[start + j].float(), candidate=False)
            codes[start + j] = code
            value = scale * grid.in_base_cells(code) + offset
            errors[:, j] = (current[:, j] - value) / u[j, j]
            if j + 1 < group_size:
                current[:, j + 1 :].addcmul_(u[j, j + 1 :, None], errors[:, j, None], value=-1)
        if group.stop < k:
            streams[:, group.stop :] -= factor[group, group.stop :].T @ errors
    return Sliced(codes.T.contiguous().cpu().numpy(), np.stack(scales, 1), np.stack(offsets, 1))
