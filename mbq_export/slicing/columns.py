"""The loops over the columns of a group: they choose the code of each weight.

Slicing spends most of its time here.  Torch's operations do the work on any device.  On the processor ``columns.c``
does the same faster (``tests/benchmarks/slicing_columns.py`` measures it).
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from mbq_runtime.bundle.manifest import GROUP_SIZES
from mbq_runtime.bundle.slice_profile import CODE_BITS, SliceProfile
from mbq_targets.build import build_for_this_machine

from ..devices import CPU

_SOURCE = Path(__file__).with_suffix(".c")


def depth_weights(profile: SliceProfile) -> tuple[float, ...]:
    """How much the error of each depth counts.

    Deep depths count most.  Their cells are the smallest, and they must stay close to the original.  The exponent is
    measured (docs/log.md): a smaller one makes 3 bits better, and a weight then leaves its cell of 4 bits more often,
    where 8 bits cannot reach it.

    Args:
        profile: the bits of each slice.
    """
    return tuple(2.0 ** ((bits - 3) / 1.25) for bits in profile.depth_bits)


class _GridOfC(ctypes.Structure):
    _fields_ = (
        ("depths", ctypes.c_int32),
        ("span", ctypes.c_float),
        ("steps", ctypes.c_float * CODE_BITS),
        ("cells", ctypes.c_float * CODE_BITS),
        ("counts", ctypes.c_float * CODE_BITS),
    )


class Grid:
    """The cells of every depth, and how a code is chosen among them.

    All steps and cells are powers of two, so their inverses are exact and products replace quotients.

    steps: float32 [E, 1], width of a cell in cells of the base quantiser.
    counts: float32 [E, 1], how much the error of a depth counts.
    of_c: the same for ``columns.c``.

    Args:
        profile: the bits of each slice.
        kept_bits: how many of a code's first bits never change.
        device: of the tensors.
    """

    def __init__(self, profile: SliceProfile, kept_bits: int, device: torch.device) -> None:
        steps = [2.0 ** (2 - bits) for bits in profile.depth_bits]
        cells = [2.0 ** (CODE_BITS - bits) for bits in profile.depth_bits]
        counts = depth_weights(profile)
        of_each = torch.tensor([steps, cells, counts]).to(device)[:, :, None]
        self.steps, self._cells, self.counts = of_each[0], of_each[1], of_each[2]
        self._per_step, self._per_cell = 1 / self.steps, 1 / self._cells
        # The codes to choose from: their number, where the first and the last cell begin, and the width of a cell.
        self._span = float(1 << (CODE_BITS - kept_bits))
        self._first, self._last = torch.zeros_like(self._cells), self._span - self._cells
        self._within = self._cells - 1
        self._kept = kept_bits > 0
        of_c = [(ctypes.c_float * CODE_BITS)(*values) for values in (steps, cells, counts)]
        self.of_c = _GridOfC(profile.depths, self._span, *of_c)

    def in_base_cells(self, codes: torch.Tensor) -> torch.Tensor:
        """Values of codes at every depth, in cells of the base quantiser.

        Args:
            codes: float32 [..., 1, N] or [N].

        Returns:
            float32 [..., E, N].
        """
        values: torch.Tensor = (codes * self._per_cell).floor_().add_(0.5).mul_(self.steps)
        return values

    def columns_in_base_cells(self, codes: torch.Tensor) -> torch.Tensor:
        """As ``in_base_cells``, for several columns.

        Args:
            codes: uint8 [columns, N].

        Returns:
            float32 [E, columns, N].
        """
        values: torch.Tensor = (codes * self._per_cell[:, :, None]).floor_().add_(0.5).mul_(self.steps[:, :, None])
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
        first = (wanted * self._per_step).floor_().mul_(self._cells)
        if self._kept:
            lowest = (code / self._span).floor_().mul_(self._span)
            # Maximum last: a cell may be wider than the span, and then it begins at its lowest code.
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
    compiled = _compiled(streams.device)
    if compiled is not None:
        assert streams[0].is_contiguous()
        compiled("feed_back", grid, codes, streams, streams.stride(0), factor.contiguous(), scale, offset, errors)
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
    compiled = _compiled(pull.device)
    if compiled is not None:
        compiled("settle", grid, codes, curvature.contiguous(), scale, pull, values)
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


class _PartOfC(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("begin", ctypes.c_int64),
        ("end", ctypes.c_int64),
    )


class _Compiled:
    """``columns.c``.  Threads share the rows, and their number does not change the result."""

    def __init__(self, library: Path) -> None:
        self._functions = ctypes.CDLL(str(library))

    def __call__(self, name: str, grid: Grid, codes: torch.Tensor, *others: torch.Tensor | int) -> None:
        """Call function ``name`` for codes [columns, N], with its other arguments: contiguous tensors and integers."""
        function = getattr(self._functions, f"mbq_{name}")
        arguments = [
            ctypes.c_int64(other) if isinstance(other, int) else ctypes.c_void_p(other.data_ptr()) for other in others
        ]
        columns, rows = codes.shape
        threads = torch.get_num_threads()

        def run(begin: int, end: int) -> None:
            part = _PartOfC(rows, columns, begin, end)
            function(ctypes.byref(grid.of_c), ctypes.byref(part), ctypes.c_void_p(codes.data_ptr()), *arguments)

        ends = [rows * i // threads for i in range(threads + 1)]
        list(_pool(threads).map(run, ends[:-1], ends[1:]))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


@cache
def _compiled(device: torch.device) -> _Compiled | None:
    """The compiled loops for the device; None where torch's operations do the work."""
    if device.type != CPU:
        return None
    library = build_for_this_machine(_SOURCE, {"MBQ_CODE_BITS": CODE_BITS, "MBQ_LARGEST_GROUP": max(GROUP_SIZES)})
    return None if library is None else _Compiled(library)
