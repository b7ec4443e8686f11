"""The stored layout ``mbq16``: bit planes in blocks of 16 rows, for compiled kernels.

N is padded to ``n16``, a multiple of 16.

* Planes are uint8, one flat array, plane after plane.  A plane of ``b`` bits holds ``[n16 / 16][K / (32 / b)][64]``
  bytes.  Byte ``4 * row + t`` of a 64-byte block holds, at bits ``b * j .. b * j + b - 1``, the field of weight
  ``k = block * (32 / b) + 4 * j + t``.
* Scales are float16 ``[n16 / 16, K / group_size, 2, 16]``: the scales of 16 rows, then their offsets.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.layout import ROW_BLOCK
from mbq_runtime.bundle.slice_profile import CODE_BITS, SliceProfile

from .codes import F16, U8

_Scalar = TypeVar("_Scalar", bound=np.generic)


def _padded(n: int) -> int:
    return -(-n // ROW_BLOCK) * ROW_BLOCK


def _pad_rows(array: NDArray[_Scalar]) -> NDArray[_Scalar]:
    return np.pad(array, [(0, _padded(len(array)) - len(array))] + [(0, 0)] * (array.ndim - 1))


def planes_shape(n: int, k: int) -> tuple[int]:
    """Shape of the packed planes of a matrix.

    Args:
        n: rows.
        k: columns.
    """
    return (_padded(n) * k * CODE_BITS // 8,)


def scales_shape(n: int, groups: int) -> tuple[int, int, int, int]:
    """Shape of the packed scales and offsets of a matrix.

    Args:
        n: rows.
        groups: K / group_size.
    """
    return _padded(n) // ROW_BLOCK, groups, 2, ROW_BLOCK


def pack_planes(codes: U8, profile: SliceProfile) -> U8:
    """Pack codes into planes.

    Args:
        codes: uint8 [N, K].
        profile: the bits of each slice.

    Returns:
        uint8 of ``planes_shape``.
    """
    padded = _pad_rows(codes)
    n16, k = padded.shape
    packed = []
    low = CODE_BITS
    for bits in profile.plane_bits:
        low -= bits
        fields = 8 // bits
        span = 4 * fields
        field = (padded >> low) & ((1 << bits) - 1)
        blocks = field.reshape(n16 // ROW_BLOCK, ROW_BLOCK, k // span, fields, 4)
        shifts = (bits * np.arange(fields, dtype=np.uint8))[:, None]
        byte = np.bitwise_or.reduce(blocks << shifts, axis=3)
        packed.append(np.ascontiguousarray(byte.transpose(0, 2, 1, 3)).reshape(-1))
    return np.concatenate(packed).astype(np.uint8)


def unpack_planes(planes: U8, n: int, k: int, profile: SliceProfile) -> U8:
    """The inverse of ``pack_planes``.

    Args:
        planes: uint8 of ``planes_shape``.
        n: rows.
        k: columns.
        profile: the bits of each slice.

    Returns:
        uint8 [n, k] codes.
    """
    n16 = _padded(n)
    codes = np.zeros((n16, k), np.uint8)
    start, low = 0, CODE_BITS
    for bits in profile.plane_bits:
        low -= bits
        fields = 8 // bits
        span = 4 * fields
        size = n16 * k * bits // 8
        byte = planes[start : start + size].reshape(n16 // ROW_BLOCK, k // span, ROW_BLOCK, 1, 4)
        start += size
        shifts = (bits * np.arange(fields, dtype=np.uint8))[:, None]
        field = (byte >> shifts) & ((1 << bits) - 1)
        codes |= (field.transpose(0, 2, 1, 3, 4).reshape(n16, k) << low).astype(np.uint8)
    return codes[:n]


def pack_scales(scale: F16, offset: F16) -> F16:
    """Pack scales and offsets.

    Args:
        scale: float16 [N, groups].
        offset: float16 [N, groups].

    Returns:
        float16 of ``scales_shape``.
    """
    both = np.stack([_pad_rows(scale), _pad_rows(offset)])
    blocks = both.reshape(2, -1, ROW_BLOCK, scale.shape[1])
    return np.ascontiguousarray(blocks.transpose(1, 3, 0, 2)).astype(np.float16)


def unpack_scales(scales: F16, n: int) -> tuple[F16, F16]:
    """The inverse of ``pack_scales``.

    Args:
        scales: float16 of ``scales_shape``.
        n: rows.

    Returns:
        float16 [n, groups] scales, and float16 [n, groups] offsets.
    """
    both = scales.transpose(2, 0, 3, 1).reshape(2, -1, scales.shape[1])
    return both[0, :n], both[1, :n]
