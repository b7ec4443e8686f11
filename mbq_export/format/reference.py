"""The number format and the ops, defined in numpy: what every kernel is tested against.

Number format.  Each group of ``group_size`` weights along K has a float16 pair (scale, offset);
each weight has one 8-bit code.  With ``bits`` the bits per weight of a depth::

    code     = clamp(floor((w - offset) / scale * 64), 0, 255)
    w(depth) = scale * 2**(2 - bits) * ((code >> (8 - bits)) + 0.5) + offset

``scale`` is the width of a cell of the 2-bit base quantiser, a quarter of the group's range, and
``offset`` the group's minimum.  This equals the recursive residual quantiser of MoBiQuant
(arXiv 2602.20191, eq. 2-3 and 11-21) with ``s1 = scale`` and ``z1 = -offset / scale``.

Packed form (row blocks of 16, so N is padded to ``n16``, a multiple of 16):

* ``planes``: uint8, one flat array, plane after plane.  A plane of ``b`` bits holds
  ``[n16 / 16][K / (32 / b)][64]`` bytes; byte ``4 * row + t`` of a 64-byte block holds, at bits
  ``b * j .. b * j + b - 1``, the field of weight ``k = block * (32 / b) + 4 * j + t``.
* ``scales``: float16 ``[n16 / 16, K / group_size, 2, 16]``: the scales of 16 rows, then their
  offsets.

Arithmetic here is float64 except where the format itself rounds (float16 scales, integer
activations).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.slice_profile import CODE_BITS, SliceProfile

ROW_BLOCK = 16
LOW_BYTES = 256  # steps of an activation's low byte that make one of its high byte
SMALLEST_ACTIVATION = np.float32(1e-30)

F16 = NDArray[np.float16]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]
I32 = NDArray[np.int32]
T = TypeVar("T", bound=np.floating)
S = TypeVar("S", bound=np.generic)


@dataclass(frozen=True)
class Sliced:
    """One weight matrix as codes.

    codes: uint8 [N, K]; scale, offset: float16 [N, K / group_size].
    """

    codes: U8
    scale: F16
    offset: F16

    @property
    def group_size(self) -> int:
        return int(self.codes.shape[1] // self.scale.shape[1])

    def rows(self, rows: slice | NDArray[np.integer]) -> Sliced:
        """Some rows of the matrix."""
        return Sliced(self.codes[rows], self.scale[rows], self.offset[rows])


def joined(parts: Sequence[Sliced]) -> Sliced:
    """Matrices of the same K, one below the other."""
    return Sliced(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("codes", "scale", "offset")))


def encode(weight: F32, scale: F16, offset: F16) -> U8:
    """Codes of a float32 [N, K] weight under given float16 [N, groups] scale and offset."""
    n, k = weight.shape
    groups = scale.shape[1]
    w = weight.astype(np.float64).reshape(n, groups, k // groups)
    s = scale.astype(np.float64)[:, :, None]
    o = offset.astype(np.float64)[:, :, None]
    # A group whose weights are all equal has scale 0: offset alone is its value.
    cells = np.divide((w - o) * 64.0, s, out=np.zeros_like(w), where=s > 0)
    return np.clip(np.floor(cells), 0, 255).astype(np.uint8).reshape(n, k)


def decode(sliced: Sliced, profile: SliceProfile, depth: int) -> F64:
    """Float64 [N, K] value of the weights at ``depth`` (1-based)."""
    return _decode(sliced, profile, depth, np.dtype(np.float64))


def decode_f32(sliced: Sliced, profile: SliceProfile, depth: int) -> F32:
    """``decode`` in float32: half the memory, for whole matrices."""
    return _decode(sliced, profile, depth, np.dtype(np.float32))


def _decode(sliced: Sliced, profile: SliceProfile, depth: int, dtype: np.dtype[T]) -> NDArray[T]:
    bits = profile.depth_bits[depth - 1]
    n, k = sliced.codes.shape
    groups = sliced.scale.shape[1]
    cells = (sliced.codes >> (CODE_BITS - bits)).astype(dtype).reshape(n, groups, k // groups)
    cells += dtype.type(0.5)
    cells *= sliced.scale.astype(dtype)[:, :, None] * dtype.type(2.0 ** (2 - bits))
    cells += sliced.offset.astype(dtype)[:, :, None]
    return cells.reshape(n, k)


def _pad_rows(array: NDArray[S]) -> NDArray[S]:
    missing = -array.shape[0] % ROW_BLOCK
    return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))


def pack_planes(codes: U8, profile: SliceProfile) -> U8:
    """uint8 [N, K] codes -> flat uint8 planes (layout above)."""
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
    """The inverse of pack_planes: flat uint8 planes -> uint8 [n, k] codes."""
    n16 = -(-n // ROW_BLOCK) * ROW_BLOCK
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
    """float16 [N, G] scale and offset -> float16 [n16 / 16, G, 2, 16]."""
    both = np.stack([_pad_rows(scale), _pad_rows(offset)])
    blocks = both.reshape(2, -1, ROW_BLOCK, scale.shape[1])
    return np.ascontiguousarray(blocks.transpose(1, 3, 0, 2)).astype(np.float16)


def unpack_scales(scales: F16, n: int) -> tuple[F16, F16]:
    """The inverse of pack_scales: -> float16 [n, G] scale, float16 [n, G] offset."""
    both = scales.transpose(2, 0, 3, 1).reshape(2, -1, scales.shape[1])
    return both[0, :n], both[1, :n]


def quantize_activations(x: F32, group_size: int, bits: int = 16) -> tuple[NDArray[np.int16], F32]:
    """Symmetric integers per token and group: float32 [M, K] -> int16 [M, K], float32 [M, G] step.

    bits: 8 or 16.  With ``t = x * (127 / max|x|)``, an integer of 8 bits is ``rint(t)`` in steps of ``max|x| / 127``.
    One of 16 bits is ``256 * high + low`` in steps of ``max|x| / 32512``: two bytes of -127 to 127 each for the dot
    products of bytes that processors have, ``high = rint(t)`` and ``low = rint(256 * (t - high))``, clipped.  Ties go
    to even, and groups below 1e-30 count as zero.

    One byte keeps perplexity within 0.25 %, but then a difference in the last bit of float32 arithmetic (another CPU,
    another engine, another order of sums) is now and then rounded up to a whole step, and thirty layers make up to
    three percent of the logits of it.
    """
    m, k = x.shape
    groups = x.reshape(m, k // group_size, group_size).astype(np.float32)
    peak = np.abs(groups).max(axis=2)
    peak = np.where(peak >= SMALLEST_ACTIVATION, peak, np.float32(0))
    step = (peak / np.float32(127 if bits == 8 else LOW_BYTES * 127)).astype(np.float32)
    inverse = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > 0)
    scaled = groups * inverse[:, :, None]
    high = np.rint(scaled)
    if bits == 8:
        return high.astype(np.int16).reshape(m, k), step
    low = np.clip(np.rint((scaled - high) * np.float32(LOW_BYTES)), -127, 127)
    return (high * LOW_BYTES + low).astype(np.int16).reshape(m, k), step


def round_activations(x: F32, group_size: int, bits: int = 16) -> F64:
    """float32 x [M, K] -> float64 [M, K]: the values a sliced matmul multiplies."""
    q, step = quantize_activations(x, group_size, bits)
    return q.astype(np.float64) * np.repeat(step.astype(np.float64), group_size, axis=1)


def sliced_matmul(x: F32, depth: I32, sliced: Sliced, profile: SliceProfile, activation_bits: int = 16) -> F64:
    """Op ``SlicedMatMul``: float32 x [M, K], int32 depth [M] -> float64 [M, N].

    Row m is ``x'[m] @ w(depth[m]).T`` with x' of ``round_activations``.
    """
    restored = round_activations(x, sliced.group_size, activation_bits)
    y = np.zeros((x.shape[0], sliced.codes.shape[0]))
    for d in np.unique(depth):
        rows = depth == d
        y[rows] = restored[rows] @ decode(sliced, profile, int(d)).T
    return y


def sliced_gather(indices: NDArray[np.int64], sliced: Sliced, profile: SliceProfile, depth: int) -> F64:
    """Op ``SlicedGather``: int64 indices [M] -> float64 rows [M, K] of the table at ``depth``."""
    return decode(sliced.rows(indices), profile, depth)


def gated_silu(x: F32) -> F64:
    """Op ``GatedSilu``: float32 x [..., 2 F] -> float64 [..., F], silu of the first half times the second."""
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    return np.asarray(gate / (1 + np.exp(-gate)) * up)


def gated_gelu(x: F32) -> F64:
    """Op ``GatedGelu``: float32 x [..., 2 F] -> float64 [..., F], the tanh form of gelu of the first half times the
    second."""
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
    return np.asarray(0.5 * gate * (1 + np.tanh(inner)) * up)


@dataclass(frozen=True)
class RouterParams:
    """Parameters of one router, for E depths.

    bias, norm_gain: float32 [E - 1]; budgets, thresholds: float32 [T], budgets ascending;
    w1: float16 [H, K], b1: float32 [H], w2: float32 [E - 1, H], or all three None.
    """

    bias: F32
    norm_gain: F32
    budgets: F32
    thresholds: F32
    w1: F16 | None = None
    b1: F32 | None = None
    w2: F32 | None = None

    @property
    def bytes(self) -> int:
        """Of what a token reads: all but the table, which the units share."""
        parts = (self.bias, self.norm_gain, self.w1, self.b1, self.w2)
        return sum(part.nbytes for part in parts if part is not None)


MEAN_SQUARE_EPS = 1e-12


def router_scores(x: F32, router: RouterParams) -> F64:
    """float32 x [M, K] -> float64 scores [M, E - 1].

    ``score = bias + norm_gain * log(ms) + w2 @ silu(w1 @ (x / sqrt(ms)) + b1)`` with
    ``ms = mean(x**2) + 1e-12``; without w1 the last term is absent (the norm rule).
    """
    wide = x.astype(np.float64)
    ms = (wide**2).mean(axis=1, keepdims=True) + MEAN_SQUARE_EPS
    scores = router.bias.astype(np.float64) + router.norm_gain.astype(np.float64) * np.log(ms)
    if router.w1 is not None:
        assert router.b1 is not None
        assert router.w2 is not None
        pre = (wide / np.sqrt(ms)) @ router.w1.astype(np.float64).T + router.b1.astype(np.float64)
        scores = scores + (pre / (1 + np.exp(-pre))) @ router.w2.astype(np.float64).T
    return np.asarray(scores)


def threshold_at(avg_bits: float, router: RouterParams) -> float:
    """The threshold for a budget: linear between the table's entries."""
    return float(np.interp(avg_bits, router.budgets, router.thresholds))


def route(x: F32, avg_bits: float, router: RouterParams) -> I32:
    """Op ``Router``: float32 x [M, K] and a budget -> int32 depth [M] in 1..E.

    Depth is one more than the number of leading scores above the threshold, so only prefixes of
    slices occur.  At or below the first budget every token gets depth 1, at or above the last E.
    """
    scores = router_scores(x, router)
    if avg_bits <= router.budgets[0]:
        return np.ones(len(x), np.int32)
    if avg_bits >= router.budgets[-1]:
        return np.full(len(x), scores.shape[1] + 1, np.int32)
    passed = np.cumprod(scores > threshold_at(avg_bits, router), axis=1)
    return np.asarray(1 + passed.sum(axis=1), np.int32)
