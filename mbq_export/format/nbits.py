"""The stored layout ``nbits``: one tensor a slice, as ONNX Runtime's MatMulNBits takes it.

MatMulNBits is fast with its default zero point, the middle of the fields.  So fields are stored about their middle,
and the rest of a weight's value is in ``centre`` and in what each depth adds to it.  With ``b`` the bits of slice
``e``, ``B`` the bits up to and including it, and ``f`` its field of the code, a weight at depth ``k`` is::

    step   = scale * profile.step(b1)               (b1: bits of slice 1)
    centre = offset + step * (0.5 + 2**(b1 - 1))
    w(k)   = centre + half(k) * step + sum over e <= k of  ratio(e) * step * (f - 2**(b - 1))
    ratio(e) = profile.step(B) / profile.step(b1)

``scale`` and ``offset`` are those of the last depth.  What they give is multiplied by ``gain(k)``, the row's factor at
depth ``k`` over that of the last depth.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.slice_profile import CODE_BITS, SliceProfile

from .codes import Sliced


def weight_inputs(profile: SliceProfile) -> tuple[str, ...]:
    """Names of a matrix's tensors, in the order in which SlicedMatMul and SlicedGather take them.

    Args:
        profile: the bits of each slice.
    """
    return (*(f"slice_{e}" for e in range(1, profile.depths + 1)), "step", "centre", "gain")


def packed_bits(width: int) -> int:
    """Bits that a field takes when it is stored: 2, 4 or 8.

    Args:
        width: bits of the field, 1 to 8.
    """
    return next(bits for bits in (2, 4, 8) if width <= bits)


def step_ratios(profile: SliceProfile) -> list[float]:
    """The step of each slice over the step of slice 1: 1, then smaller values.

    Args:
        profile: the bits of each slice.
    """
    return [profile.step(upto) / profile.step(profile.min_bits) for upto in profile.depth_bits]


def half_steps(profile: SliceProfile) -> list[float]:
    """What each depth adds to ``centre``, in steps of slice 1.

    Args:
        profile: the bits of each slice.
    """
    ratios = step_ratios(profile)
    middles = accumulate(ratio * 2 ** (width - 1) for ratio, width in zip(ratios, profile.slices, strict=True))
    found = [
        ratio * profile.middle(bits) + fields
        for ratio, bits, fields in zip(ratios, profile.depth_bits, middles, strict=True)
    ]
    return [value - found[0] for value in found]


def side_by_side(tensors: Mapping[str, NDArray[np.generic]], count: int) -> dict[str, NDArray[np.generic]]:
    """The tensors of a matrix whose rows are cut into parts that stand beside each other: [N / count, count * K].

    A sum of products with each part is then one product.

    Args:
        tensors: of the matrix [N, K], as ``pack_nbits`` makes them.
        count: of parts.
    """
    found = dict[str, NDArray[np.generic]]()
    for name, tensor in tensors.items():
        if name == "gain":
            # Rows of several parts are summed, so they must have one gain.
            assert (tensor == 1).all()
            found[name] = tensor[:, : tensor.shape[1] // count]
            continue
        parts = np.swapaxes(tensor.reshape(count, len(tensor) // count, *tensor.shape[1:]), 0, 1)
        found[name] = parts.reshape(parts.shape[0], -1, *tensor.shape[2:])
    return found


def pack_nbits(sliced: Sliced, profile: SliceProfile) -> dict[str, NDArray[np.generic]]:
    """The tensors of one matrix, with the keys and the order of ``weight_inputs``.

    Args:
        sliced: a matrix [N, K].
        profile: the bits of each slice.

    Returns:
        slice_e: uint8 [N, G, group_size * bits / 8], fields of slice ``e`` with zero point ``2**(bits - 1)``, lowest
        bits first; step and centre: float32 [N, G]; gain: float32 [1 + E, N], by depth, of which the first is not used.
    """
    n, groups = sliced.scale_codes.shape
    tensors: dict[str, NDArray[np.generic]] = {}
    for e, (width, upto) in enumerate(zip(profile.slices, profile.depth_bits, strict=True), 1):
        bits = packed_bits(width)
        field = (sliced.codes >> (CODE_BITS - upto)) & ((1 << width) - 1)
        stored = (field + ((1 << (bits - 1)) - (1 << (width - 1)))).astype(np.uint8)
        parts = stored.reshape(n, groups, -1, 8 // bits)
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        tensors[f"slice_{e}"] = np.bitwise_or.reduce(parts << shifts, axis=3)
    step = sliced.scale * np.float32(profile.step(profile.min_bits))
    first = 0.5 + 2.0 ** (profile.min_bits - 1)
    tensors["step"] = step
    tensors["centre"] = (sliced.offset.astype(np.float64) + step * first).astype(np.float32)
    tensors["gain"] = np.concatenate([np.ones((1, n), np.float32), sliced.gain.T])
    return tensors
