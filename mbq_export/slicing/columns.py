"""The loops over the columns of a group: they choose the code of each weight.

Slicing spends most of its time here.  Torch's operations do the work on any device.  On the processor ``columns.c``
does the same faster (``tests/benchmarks/slicing_columns.py`` measures it).
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

from mbq_runtime.bundle.facts import GROUP_SIZES
from mbq_runtime.bundle.slice_profile import CODE_BITS, SliceProfile

from ..compiled import Compiled, compiled

_SOURCE = Path(__file__).with_suffix(".c")


DEEP = 0.8
"""How much more a depth counts for each bit that it has more: its error counts ``2**(DEEP * bits)`` times.  Deep depths
must stay close to the original.  The exponent is measured (docs/log.md): with a smaller one 3 bits are better, and 8
bits reach fewer weights from the coarse cells that are then chosen."""
DEEP_LATER = 0.45
"""The same where the fine bits are chosen again later.  Then deep depths depend on this choice less."""


class _GridOfC(ctypes.Structure):
    _fields_ = (
        ("depths", ctypes.c_int32),
        ("coarse_depths", ctypes.c_int32),
        ("span", ctypes.c_float),
        ("coarse_cell", ctypes.c_float),
        ("coarse_width", ctypes.c_float),
        ("steps", ctypes.c_float * CODE_BITS),
        ("per_step", ctypes.c_float * CODE_BITS),
        ("cells", ctypes.c_float * CODE_BITS),
        ("per_cell", ctypes.c_float * CODE_BITS),
        ("begins", ctypes.c_float * CODE_BITS),
        ("counts", ctypes.c_float * CODE_BITS),
    )


class Grid:
    """The cells of every depth, and how a code is chosen among them.

    A code has coarse bits and fine bits (``SliceProfile.coarse_bits``).  Codes with the same coarse bits are a coarse
    cell.  Depths of coarse bits have cells side by side.  Deeper depths divide a coarse cell into steps, from somewhat
    before its begin to somewhat behind its end.

    All lengths are in cells of the base quantiser.  E is the number of depths whose cells can still be chosen: those of
    more bits than are kept.

    depths: E.
    steps: float32 [E, 1], width of a cell.
    counts: float32 [E, 1], how much the error of a depth counts.
    of_c: the same for ``columns.c``.

    Args:
        profile: the bits of each slice.
        kept_bits: how many of a code's first bits never change.
        device: of the tensors.
        deep: how much more deep depths count; see ``DEEP``.
    """

    def __init__(self, profile: SliceProfile, kept_bits: int, device: torch.device, deep: float = DEEP) -> None:
        coarse = profile.coarse_bits
        depth_bits = [bits for bits in profile.depth_bits if bits > kept_bits]
        self.depths = len(depth_bits)
        steps = [profile.step(bits) for bits in depth_bits]
        cells = [2.0 ** (CODE_BITS - bits) for bits in depth_bits]
        width = 2.0 ** (2 - coarse)
        begins = [
            0.0 if bits <= coarse else (width - step * 2.0 ** (bits - coarse)) / 2
            for bits, step in zip(depth_bits, steps, strict=True)
        ]
        counts = [2.0 ** (deep * (bits - profile.min_bits)) for bits in depth_bits]
        per_step = [1 / step for step in steps]
        of_each = torch.tensor([steps, per_step, cells, begins, counts]).to(device)[:, :, None]
        self.steps, self._per_step, self._cells, self._begins, self.counts = of_each
        self._coarse_depths = sum(bits <= coarse for bits in depth_bits)
        self._coarse_cell, self._coarse_width = 2.0 ** (CODE_BITS - coarse), width
        # The codes to choose from: their number.
        self._span = float(1 << (CODE_BITS - kept_bits))
        per_cell = [1 / cell for cell in cells]
        fields = (steps, per_step, cells, per_cell, begins, counts)
        of_c = [(ctypes.c_float * CODE_BITS)(*values) for values in fields]
        self.of_c = _GridOfC(self.depths, self._coarse_depths, self._span, self._coarse_cell, self._coarse_width, *of_c)

    def in_base_cells(self, codes: torch.Tensor) -> torch.Tensor:
        """Values of codes at every depth, in cells of the base quantiser.

        Args:
            codes: float32 or uint8 of any shape.

        Returns:
            float32 [E, ...].
        """
        codes = codes.float()
        coarse = (codes / self._coarse_cell).floor()
        fine, begin = codes - coarse * self._coarse_cell, coarse * self._coarse_width
        values = torch.empty(len(self.steps), *codes.shape, device=codes.device)
        for e, value in enumerate(values):
            counted, start = (codes, 0.0) if e < self._coarse_depths else (fine, begin + self._begins[e])
            value.copy_((counted / self._cells[e]).floor().add_(0.5).mul_(self.steps[e]).add_(start))
        return values

    def best_code(self, wanted: torch.Tensor, code: torch.Tensor, candidate: bool) -> torch.Tensor:
        """The best code of each row.

        Args:
            wanted: float32 [E, N], the wanted values in cells of the base quantiser.
            code: float32 [N], the codes so far.
            candidate: whether the code so far is a candidate.

        Returns:
            float32 [N].
        """
        lowest = (code / self._span).floor() * self._span
        found = [self._candidate(e, wanted, lowest) for e in range(len(self.steps))]
        candidates = torch.stack([*found, code] if candidate else found)
        away = self.in_base_cells(candidates) - wanted[:, None]
        cost = away.square_().mul_(self.counts[:, :, None]).sum(0)
        return candidates.gather(0, cost.argmin(0, keepdim=True))[0]

    def _candidate(self, depth: int, wanted: torch.Tensor, lowest: torch.Tensor) -> torch.Tensor:
        """The best code for the deepest depth in the cell that one depth alone would choose, float32 [N]."""
        cell, width = self._coarse_cell, self._coarse_width
        if depth < self._coarse_depths:
            near = self._own_cell(wanted[-1], lowest, cell, width)
            first = self._own_cell(wanted[depth], lowest, self._cells[depth], self.steps[depth])
            coarse = torch.maximum(_within(near, first, first + self._cells[depth] - cell), lowest)
            return self._finest(wanted[-1], coarse, cell)
        coarse = self._own_cell(wanted[depth], lowest, cell, width)
        begin = coarse / cell * width + self._begins[depth]
        at = ((wanted[depth] - begin) * self._per_step[depth]).floor() * self._cells[depth]
        return self._finest(wanted[-1], coarse + at.clamp(0, cell - float(self._cells[depth])), self._cells[depth])

    def _own_cell(self, wanted: torch.Tensor, lowest: torch.Tensor, cell: Any, width: Any) -> torch.Tensor:
        """First codes of the cells that a wish lies in, or is nearest to among the codes to choose from."""
        return _within((wanted / width).floor() * cell, lowest, torch.maximum(lowest + self._span - cell, lowest))

    def _finest(self, wanted: torch.Tensor, first: torch.Tensor, size: Any) -> torch.Tensor:
        """The codes nearest to the deepest depth's wish, among ``size`` codes of one coarse cell from ``first`` on."""
        if self._coarse_depths == len(self.steps):
            return first
        coarse = (first / self._coarse_cell).floor()
        begin = coarse * self._coarse_width + self._begins[-1]
        at = coarse * self._coarse_cell + ((wanted - begin) * self._per_step[-1]).floor()
        return _within(at, first, first + size - 1)


def _within(values: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return torch.maximum(torch.minimum(values, high), low)


def feed_back(
    grid: Grid,
    streams: torch.Tensor,
    factor: torch.Tensor,
    codes: torch.Tensor,
    *,
    scale: torch.Tensor,
    offset: torch.Tensor,
) -> torch.Tensor:
    """Round the columns of a group in order, and feed the error of each into the columns after it.

    Args:
        grid: the cells of every depth.
        streams: float32 [E, columns, N], the weights that each depth wants.  They do not change.
        factor: float32 [columns, columns], upper triangular.
        codes: uint8 [columns, N], written to.
        scale: float32 [N].
        offset: float32 [N].

    Returns:
        float32 [E, columns, N]: the errors over the diagonal of ``factor``.
    """
    errors = torch.empty(streams.shape, device=streams.device)
    in_c = _compiled(streams.device)
    if in_c is not None:
        assert streams[0].is_contiguous()
        columns, rows = codes.shape
        strides = rows, columns, streams.stride(0)
        in_c("mbq_feed_back", rows, grid.of_c, *strides, codes, streams, factor.contiguous(), scale, offset, errors)
        return errors
    current, inverse = streams.clone(), _inverse(scale)
    for j in range(len(codes)):
        wanted = (current[:, j] - offset) * inverse
        code = grid.best_code(wanted, codes[j].float(), candidate=False)
        codes[j] = code
        errors[:, j] = (current[:, j] - (scale * grid.in_base_cells(code) + offset)) / factor[j, j]
        current[:, j + 1 :].addcmul_(factor[j, j + 1 :, None], errors[:, j, None], value=-1)
    return errors


def settle(
    grid: Grid,
    codes: torch.Tensor,
    values: torch.Tensor,
    *,
    curvature: torch.Tensor,
    scale: torch.Tensor,
    pull: torch.Tensor,
) -> None:
    """Give the columns of a group, in order, the best codes while all other columns stay.

    Args:
        grid: the cells of every depth.
        codes: uint8 [columns, N], written to.
        values: float32 [E, columns, N], values of the codes in cells of the base quantiser, written to.
        curvature: float32 [columns, columns].
        scale: float32 [N].
        pull: float32 [E, columns, N], minus half the gradient of the error by each value.  It is overwritten.
    """
    in_c = _compiled(pull.device)
    if in_c is not None:
        columns, rows = codes.shape
        in_c("mbq_settle", rows, grid.of_c, rows, columns, codes, curvature.contiguous(), scale, pull, values)
        return
    inverse = _inverse(scale)
    for j in range(len(codes)):
        wanted = values[:, j] + pull[:, j] * (inverse / curvature[j, j])
        code = grid.best_code(wanted, codes[j].float(), candidate=True)
        codes[j] = code
        value = grid.in_base_cells(code)
        change = (value - values[:, j]).mul_(scale)
        pull[:, j + 1 :].addcmul_(curvature[j, j + 1 :, None], change[:, None], value=-1)
        values[:, j] = value


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale > 0, 1 / scale, 0.0)


def _compiled(device: torch.device) -> Compiled | None:
    """The compiled loops for the device; None where torch's operations do the work."""
    return compiled(_SOURCE, device, {"MBQ_CODE_BITS": CODE_BITS, "MBQ_LARGEST_GROUP": max(GROUP_SIZES)})
