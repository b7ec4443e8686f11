"""The codes: one 8-bit number a weight, read to the precision of a depth.

Each group of ``group_size`` weights along K has a float16 pair (scale, offset).  Each weight has one 8-bit code.
With ``bits`` the bits per weight of a depth::

    code     = clamp(floor((w - offset) / scale * 64), 0, 255)
    w(depth) = scale * 2**(2 - bits) * ((code >> (8 - bits)) + 0.5) + offset

``scale`` is the width of a cell of the 2-bit base quantiser: a quarter of the group's range.  ``offset`` is the
group's minimum.  This equals the recursive residual quantiser of MoBiQuant (arXiv 2602.20191, eq. 2-3 and 11-21)
with ``s1 = scale`` and ``z1 = -offset / scale``.

The modules of ``mbq_export.format`` define the number format and the ops in numpy.  Every kernel is tested against
them.  They compute in float64, but where the format itself rounds: float16 scales and integer activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.slice_profile import CODE_BITS, SliceProfile

F16 = NDArray[np.float16]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]
I32 = NDArray[np.int32]
_Float = TypeVar("_Float", bound=np.floating)


@dataclass(frozen=True)
class Sliced:
    """One weight matrix as codes.

    codes: uint8 [N, K].
    scale: float16 [N, K / group_size].
    offset: float16 [N, K / group_size].
    """

    codes: U8
    scale: F16
    offset: F16

    @property
    def group_size(self) -> int:
        """Weights that share a scale and an offset."""
        return int(self.codes.shape[1] // self.scale.shape[1])

    def rows(self, rows: slice | NDArray[np.integer]) -> Sliced:
        """Some rows of the matrix.

        Args:
            rows: which of the N rows, as numpy takes an index.
        """
        return Sliced(self.codes[rows], self.scale[rows], self.offset[rows])


def joined(parts: Sequence[Sliced]) -> Sliced:
    """Stack matrices of the same K, one below the other.

    Args:
        parts: at least one matrix.
    """
    return Sliced(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("codes", "scale", "offset")))


def encode(weight: F32, scale: F16, offset: F16) -> U8:
    """Codes of a weight under given scales and offsets.

    Args:
        weight: float32 [N, K].
        scale: float16 [N, K / group_size].
        offset: float16 [N, K / group_size].

    Returns:
        uint8 [N, K].
    """
    n, k = weight.shape
    groups = scale.shape[1]
    w = weight.astype(np.float64).reshape(n, groups, k // groups)
    s = scale.astype(np.float64)[:, :, None]
    o = offset.astype(np.float64)[:, :, None]
    # A group of equal weights has scale 0: its value is the offset alone.
    cells = np.divide((w - o) * 64.0, s, out=np.zeros_like(w), where=s > 0)
    return np.clip(np.floor(cells), 0, 255).astype(np.uint8).reshape(n, k)


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
    groups = sliced.scale.shape[1]
    cells = (sliced.codes >> (CODE_BITS - bits)).astype(dtype).reshape(n, groups, k // groups)
    cells += dtype.type(0.5)
    cells *= sliced.scale.astype(dtype)[:, :, None] * dtype.type(2.0 ** (2 - bits))
    cells += sliced.offset.astype(dtype)[:, :, None]
    return cells.reshape(n, k)
