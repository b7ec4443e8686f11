"""The stored layout ``mbq16``: bit planes in blocks of 16 rows, for compiled kernels.

N is padded to ``n16``, a multiple of 16.

* Each slice is one uint8 array, flat, plane after plane.  So a file can hold the first slices of all matrices before
  the second ones.  A plane of ``b`` bits holds ``[n16 / 16][K / (32 / b)][64]`` bytes.  Byte ``4 * row + t`` of a
  64-byte block holds, at bits ``b * j .. b * j + b - 1``, the field of weight ``k = block * (32 / b) + 4 * j + t``.
* Scales are uint8 ``[n16 / 16, E + K / group_size, 32]``.  The first 32 bytes of a row block are the float16 factors of
  its 16 rows at depth 1, and so on for each of the E depths.  Each further 32 bytes are the scales of a group's 16
  rows, then their zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.layout import ROW_BLOCK
from mbq_runtime.bundle.slice_profile import CODE_BITS, SliceProfile

from .codes import F16, U8, Sliced

_Scalar = TypeVar("_Scalar", bound=np.generic)


_AT_ONCE = 1 << 24
"""Codes that are packed at once."""


def _padded(n: int) -> int:
    return -(-n // ROW_BLOCK) * ROW_BLOCK


def _pad_rows(array: NDArray[_Scalar]) -> NDArray[_Scalar]:
    if len(array) % ROW_BLOCK == 0:
        return array
    return np.pad(array, [(0, _padded(len(array)) - len(array))] + [(0, 0)] * (array.ndim - 1))


def slice_bytes(n: int, k: int, width: int) -> int:
    """Bytes of the packed planes of a slice.

    Args:
        n: rows.
        k: columns.
        width: bits of the slice.
    """
    return _padded(n) * k * width // 8


def scales_shape(n: int, groups: int, depths: int) -> tuple[int, int, int]:
    """Shape of the packed scales of a matrix.

    Args:
        n: rows.
        groups: K / group_size.
        depths: E.
    """
    return _padded(n) // ROW_BLOCK, depths + groups, 2 * ROW_BLOCK


def pack_slices(codes: U8, profile: SliceProfile) -> list[U8]:
    """Pack codes into the planes of each slice.

    Args:
        codes: uint8 [N, K].
        profile: the bits of each slice.

    Returns:
        For each slice, uint8 [``slice_bytes``].
    """
    padded, packed = _pad_rows(codes), []
    low = CODE_BITS
    for planes in profile.planes_of_slices:
        of_slice = []
        for bits in planes:
            low -= bits
            of_slice.append(_plane(padded, low, bits))
        packed.append(np.concatenate(of_slice) if len(of_slice) > 1 else of_slice[0])
    return packed


def _plane(codes: U8, low: int, bits: int) -> U8:
    """The plane of ``bits`` bits from bit ``low`` on of uint8 [n16, k], uint8 [n16 * k * bits / 8]."""
    n16, k = codes.shape
    fields = 8 // bits
    span = 4 * fields
    shifts = (bits * np.arange(fields, dtype=np.uint8))[:, None]
    plane = np.empty((n16 // ROW_BLOCK, k // span, ROW_BLOCK, 4), np.uint8)
    # A table may be almost as large as memory.
    step = max(1, _AT_ONCE // (ROW_BLOCK * k))
    for start in range(0, len(plane), step):
        rows = codes[start * ROW_BLOCK : (start + step) * ROW_BLOCK]
        field = (rows >> low) & ((1 << bits) - 1)
        blocks = field.reshape(-1, ROW_BLOCK, k // span, fields, 4)
        plane[start : start + step] = np.bitwise_or.reduce(blocks << shifts, axis=3).transpose(0, 2, 1, 3)
    return plane.reshape(-1)


def unpack_slices(slices: Sequence[U8], n: int, k: int, profile: SliceProfile) -> U8:
    """The inverse of ``pack_slices``.

    Args:
        slices: for each slice, uint8 [``slice_bytes``].
        n: rows.
        k: columns.
        profile: the bits of each slice.

    Returns:
        uint8 [n, k] codes.
    """
    n16 = _padded(n)
    codes = np.zeros((n16, k), np.uint8)
    low = CODE_BITS
    for planes, stored in zip(profile.planes_of_slices, slices, strict=True):
        start = 0
        for bits in planes:
            low -= bits
            fields = 8 // bits
            size = n16 * k * bits // 8
            byte = stored[start : start + size].reshape(n16 // ROW_BLOCK, k // (4 * fields), ROW_BLOCK, 1, 4)
            start += size
            shifts = (bits * np.arange(fields, dtype=np.uint8))[:, None]
            field = (byte >> shifts) & ((1 << bits) - 1)
            codes |= (field.transpose(0, 2, 1, 3, 4).reshape(n16, k) << low).astype(np.uint8)
    return codes[:n]


def pack_scales(sliced: Sliced) -> U8:
    """Pack factors of rows, scales and zeros.

    Args:
        sliced: a matrix [N, K].

    Returns:
        uint8 of ``scales_shape``.
    """
    depths = sliced.row_scale.shape[1]
    of_depths = _pad_rows(sliced.row_scale.astype("<f2")).reshape(-1, ROW_BLOCK, depths).transpose(0, 2, 1)
    rows = np.ascontiguousarray(of_depths).view(np.uint8)
    both = np.stack([_pad_rows(sliced.scale_codes), _pad_rows(sliced.zero_codes)])
    groups = both.reshape(2, len(rows), ROW_BLOCK, -1).transpose(1, 3, 0, 2).reshape(len(rows), -1, 2 * ROW_BLOCK)
    return np.concatenate([rows, groups], axis=1)


def unpack_scales(scales: U8, n: int, depths: int) -> tuple[U8, U8, F16]:
    """The inverse of ``pack_scales``.

    Args:
        scales: uint8 of ``scales_shape``.
        n: rows.
        depths: E.

    Returns:
        The fields of ``Sliced`` after its codes: uint8 [n, groups] scales, uint8 [n, groups] zeros, float16 [n, E].
    """
    of_depths = np.ascontiguousarray(scales[:, :depths]).view("<f2")
    rows = of_depths.transpose(0, 2, 1).reshape(-1, depths).astype(np.float16)
    groups = scales[:, depths:]
    both = groups.reshape(len(scales), -1, 2, ROW_BLOCK).transpose(2, 0, 3, 1).reshape(2, len(rows), -1)
    return both[0, :n], both[1, :n], rows[:n]


def weight_inputs(profile: SliceProfile) -> tuple[str, ...]:
    """Names of a matrix's tensors, in the order in which RoutedMatMul and SlicedGather take them.

    Args:
        profile: the bits of each slice.
    """
    return (*(f"planes_{e}" for e in range(1, profile.depths + 1)), "scales")


def pack_matrix(sliced: Sliced, profile: SliceProfile) -> dict[str, NDArray[np.generic]]:
    """The tensors of one matrix, with the keys and the order of ``weight_inputs``.

    Args:
        sliced: a matrix [N, K].
        profile: the bits of each slice.
    """
    packed: list[NDArray[np.generic]] = [*pack_slices(sliced.codes, profile), pack_scales(sliced)]
    return dict(zip(weight_inputs(profile), packed, strict=True))
