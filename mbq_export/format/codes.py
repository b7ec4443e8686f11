"""The codes: one 8-bit number a weight, read to the precision of a depth.

Each group of ``group_size`` weights along K has an 8-bit scale and an 8-bit zero.  Each row has a float16 factor of all
its scales for each depth.  With ``bits`` the bits per weight of a depth::

    level    = level of the code at the depth (``levels``)
    w(depth) = s * (step(bits) * (level + middle(bits)) - zero / 64)        s = row_scale[depth] * scale / 256

``s`` is the width of a cell of the 2-bit base quantiser.  ``SliceProfile`` gives ``step`` and ``middle``, and says
which bits of a code are coarse.  For a depth of coarse bits, the level is the first ``bits`` bits of the code, ``step``
is ``2**(2 - bits)`` and ``middle`` is 0.5.  This equals the recursive residual quantiser of MoBiQuant (arXiv
2602.20191, eq. 2-3 and 11-21) with ``s1 = s`` and ``z1 = zero / 64``.  The fine bits divide a span that is wider than a
coarse cell.  So neighbouring spans overlap: where error feedback puts a weight into a neighbour's coarse cell, deep
depths can still reach the weight.

The modules of ``mbq_export.format`` define the number format and the ops in numpy.  Every kernel is tested against
them.  They compute in float64, but where the format itself rounds: scales, zeros and integer activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.layout import SCALE_STEPS, ZERO_STEPS
from mbq_runtime.bundle.slice_profile import CODE_BITS, SliceProfile

F16 = NDArray[np.float16]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]
I32 = NDArray[np.int32]
_Float = TypeVar("_Float", bound=np.floating)

LARGEST_CODE = 255
"""Of a scale or a zero."""


@dataclass(frozen=True)
class Sliced:
    """One weight matrix as codes.

    codes: uint8 [N, K].
    scale_codes: uint8 [N, K / group_size], scales in steps of ``row_scale / 256``.
    zero_codes: uint8 [N, K / group_size], zeros in steps of a 64th scale.
    row_scale: float16 [N, E], a row's factor at each depth.  Codes and scales are chosen for that of the last depth.
    """

    codes: U8
    scale_codes: U8
    zero_codes: U8
    row_scale: F16

    @property
    def group_size(self) -> int:
        """Weights that share a scale and a zero."""
        return int(self.codes.shape[1] // self.scale_codes.shape[1])

    @property
    def scale(self) -> F32:
        """float32 [N, K / group_size], ``scale_at`` of the last depth."""
        return self.scale_at(0)

    @property
    def offset(self) -> F32:
        """float32 [N, K / group_size], ``offset_at`` of the last depth."""
        return self.offset_at(0)

    @property
    def gain(self) -> F32:
        """float32 [N, E]: a row's factor at each depth, over that of the last depth."""
        factors = self.row_scale.astype(np.float32)
        # A row of zeros has factors of 0.
        return np.divide(factors, factors[:, -1:], out=np.ones_like(factors), where=factors[:, -1:] > 0)

    def with_gain(self, gain: F32) -> Sliced:
        """The same with other factors at each depth.

        Args:
            gain: float32 [N, E], over that of the last depth, whose own gain is 1.
        """
        return replace(self, row_scale=(self.row_scale[:, -1:].astype(np.float32) * gain).astype(np.float16))

    def scale_at(self, depth: int) -> F32:
        """The width of a cell of the 2-bit base quantiser, float32 [N, K / group_size], exact.

        Args:
            depth: 1-based, or 0 for the last one.
        """
        factor = self.row_scale[:, depth - 1].astype(np.float32) / np.float32(SCALE_STEPS)
        return self.scale_codes.astype(np.float32) * factor[:, None]

    def offset_at(self, depth: int) -> F32:
        """The value where the first cell begins, float32 [N, K / group_size].

        Args:
            depth: 1-based, or 0 for the last one.
        """
        return -self.scale_at(depth) * (self.zero_codes.astype(np.float32) / np.float32(ZERO_STEPS))

    def rows(self, rows: slice | NDArray[np.integer]) -> Sliced:
        """Some rows of the matrix.

        Args:
            rows: which of the N rows, as numpy takes an index.
        """
        return Sliced(self.codes[rows], self.scale_codes[rows], self.zero_codes[rows], self.row_scale[rows])


def joined(parts: Sequence[Sliced]) -> Sliced:
    """Stack matrices of the same K, one below the other.

    Args:
        parts: at least one matrix.
    """
    names = ("codes", "scale_codes", "zero_codes", "row_scale")
    return Sliced(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def row_scales(largest: F32, profile: SliceProfile) -> F16:
    """Factors of rows whose largest scales are given, the same at every depth.

    Args:
        largest: float32 [N].
        profile: the bits of each slice.

    Returns:
        float16 [N, E], rounded up.
    """
    wanted = largest * np.float32(SCALE_STEPS / LARGEST_CODE)
    rounded = wanted.astype(np.float16)
    found = np.where(rounded.astype(np.float32) < wanted, np.nextafter(rounded, np.float16(np.inf)), rounded)
    return np.repeat(found[:, None], profile.depths, axis=1)


def scale_codes(scale: F32, row_scale: F16, *, up: bool = False) -> U8:
    """The nearest 8-bit scales.  A positive scale stays positive.

    Args:
        scale: float32 [N, groups].
        row_scale: float16 [N, E].
        up: round up instead.
    """
    factor = row_scale[:, -1:].astype(np.float32)
    steps = np.divide(scale * np.float32(SCALE_STEPS), factor, out=np.zeros_like(scale), where=factor > 0)
    rounded: F32 = np.ceil(steps) if up else np.rint(steps)
    return np.asarray(np.clip(rounded, scale > 0, LARGEST_CODE), np.uint8)


def zero_codes(offset: F32, scale: F32, *, up: bool = False) -> U8:
    """The nearest 8-bit zeros.

    Args:
        offset: float32 [N, groups], where the first cells begin.
        scale: float32 [N, groups], as stored.
        up: round up instead, so that the first cell begins at ``offset`` or below.
    """
    steps = np.divide(-offset * np.float32(ZERO_STEPS), scale, out=np.zeros_like(scale), where=scale > 0)
    return np.asarray(np.clip(np.ceil(steps) if up else np.rint(steps), 0, LARGEST_CODE), np.uint8)


def with_scales(sliced: Sliced, scale: F32, offset: F32) -> Sliced:
    """The same codes and row factors with other scales and offsets, rounded to what the format holds.

    Args:
        sliced: a matrix [N, K].
        scale: float32 [N, groups].
        offset: float32 [N, groups].
    """
    kept = Sliced(sliced.codes, scale_codes(scale, sliced.row_scale), sliced.zero_codes, sliced.row_scale)
    return Sliced(kept.codes, kept.scale_codes, zero_codes(offset, kept.scale), kept.row_scale)


def encode(weight: F32, scale: F32, offset: F32, profile: SliceProfile) -> U8:
    """Codes of a weight under given scales and offsets, each rounded to nearest at all bits.

    Args:
        weight: float32 [N, K].
        scale: float32 [N, K / group_size].
        offset: float32 [N, K / group_size].
        profile: the bits of each slice.

    Returns:
        uint8 [N, K].
    """
    n, k = weight.shape
    groups, coarse_bits = scale.shape[1], profile.coarse_bits
    w = weight.astype(np.float64).reshape(n, groups, k // groups)
    s = scale.astype(np.float64)[:, :, None]
    o = offset.astype(np.float64)[:, :, None]
    # A row of zeros has scale 0.
    cells = np.divide(w - o, s, out=np.zeros_like(w), where=s > 0)
    coarse = np.clip(np.floor(cells / profile.step(coarse_bits)), 0, (1 << coarse_bits) - 1)
    if coarse_bits < CODE_BITS:
        at = cells / profile.step(CODE_BITS) - profile.middle(CODE_BITS) - coarse * profile.stride(CODE_BITS)
        most = 1 << (CODE_BITS - coarse_bits)
        coarse = coarse * most + np.clip(np.rint(at), 0, most - 1)
    return coarse.astype(np.uint8).reshape(n, k)


def levels(codes: U8, profile: SliceProfile, bits: int) -> U8:
    """Levels of codes at a depth.

    Args:
        codes: uint8 of any shape.
        profile: the bits of each slice.
        bits: bits per weight of the depth.

    Returns:
        uint8 of the same shape.
    """
    if bits <= profile.coarse_bits:
        return np.asarray(codes >> (CODE_BITS - bits), np.uint8)
    fine_bits = CODE_BITS - profile.coarse_bits
    fine = (codes & ((1 << fine_bits) - 1)) >> (CODE_BITS - bits)
    return np.asarray((codes >> fine_bits) * np.uint8(profile.stride(bits)) + fine, np.uint8)


def decode(sliced: Sliced, profile: SliceProfile, depth: int) -> F64:
    """Weights at a depth.

    Args:
        sliced: a matrix [N, K].
        profile: the bits of each slice.
        depth: 1-based.

    Returns:
        float64 [N, K].
    """
    return _decode(sliced, profile, depth, np.dtype(np.float64))


def decode_f32(sliced: Sliced, profile: SliceProfile, depth: int) -> F32:
    """``decode`` in float32, which takes half the memory.

    Args:
        sliced: a matrix [N, K].
        profile: the bits of each slice.
        depth: 1-based.

    Returns:
        float32 [N, K].
    """
    return _decode(sliced, profile, depth, np.dtype(np.float32))


def _decode(sliced: Sliced, profile: SliceProfile, depth: int, dtype: np.dtype[_Float]) -> NDArray[_Float]:
    bits = profile.depth_bits[depth - 1]
    n, k = sliced.codes.shape
    groups = sliced.scale_codes.shape[1]
    cells = levels(sliced.codes, profile, bits).astype(dtype).reshape(n, groups, k // groups)
    cells += dtype.type(profile.middle(bits))
    cells *= dtype.type(profile.step(bits))
    cells -= (sliced.zero_codes.astype(dtype) / dtype.type(ZERO_STEPS))[:, :, None]
    cells *= sliced.scale_at(depth).astype(dtype)[:, :, None]
    return cells.reshape(n, k)
