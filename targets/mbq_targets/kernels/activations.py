"""Rounds activations to integers of one or two bytes, per token and group, bit for bit as the definition does."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from ..constants import LOW_BITS, SMALLEST_ACTIVATION
from .emit import LANES, Expr, bind, cast, const, function, intrin, load, reinterpret, splat, store
from .isa import Isa

TILE_K = 512
"""Weights along K of one tile of prefill. A token's activations lie in runs of the same length."""


def chunks(groups: Expr, group: int) -> Expr:
    """How many tiles the groups of a row span.

    Args:
        groups: groups along K.
        group: weights of a group.
    """
    return bind((groups + (TILE_K // group - 1)) // (TILE_K // group))


def bytes_at(g: Expr, width: int, rows: Expr, group: int) -> list[Expr]:
    """Offset of each run of a group's activations from the token's first byte.

    q is int8 [chunks][width][rows][TILE_K]. The activations of a tile are one run of memory for all tokens. With rows K
    bytes apart, often a power of two, tokens would compete for a few sets of the cache.

    The runs are the bytes of the activations, the high byte first. If there are several tokens and the instruction set
    has ``Isa.pairs``, the first run is int16, the activations of even k, and the second run those of odd k.

    Args:
        g: the group.
        width: bytes of an activation.
        rows: tokens in q.
        group: weights of a group.
    """
    per_tile = TILE_K // group
    return [bind(((g // per_tile) * width + byte) * rows * TILE_K + (g % per_tile) * group) for byte in range(width)]


def joined(of_bytes: list[Expr], lanes: int) -> Expr:
    """Sums of products with two-byte integers, from the sums with each byte.

    Args:
        of_bytes: int32 sums for each byte, the high byte first.
        lanes: lanes of each sum.
    """
    total = of_bytes[0]
    for low in of_bytes[1:]:
        total = bind((total << const(LOW_BITS, "int32", lanes)) + low)
    return total


def quantize(isa: Isa, group: int, width: int, name: str) -> None:
    """Kernel: one token's activations to integers, by the rule of ``quantize_activations`` in ``mbq_export.format``.

    Kernel arguments: x float32 [groups * group]; q int8, laid out as in ``bytes_at`` for ``rows`` tokens; step float32
    [groups]; total float32 [groups], step times the sum of the integers; sums int32 [groups], that sum.

    Args:
        isa: instruction set.
        group: weights of a group.
        width: bytes of an activation.
        name: the function's symbol.
    """
    pointers = {"x": "float32", "q": "int8", "step": "float32", "total": "float32", "sums": "int32"}
    with function(name, pointers, ("groups", "rows")) as args:
        x, q, step, total, sums, groups, rows = args
        with T.serial(0, groups) as g:
            places = bytes_at(g, width, rows, group)
            values = [load(x, g * group + i, LANES) for i in range(0, group, LANES)]
            sizes = [size_bits(value) for value in values]
            largest = sizes[0]
            for size in sizes[1:]:
                largest = bind(T.max(largest, size))
            inverse, one_step = steps_of(largest, width)
            counts, integers = const(0, "int32", LANES), []
            for value in values:
                parts = bytes_of(value, inverse, width)
                integers.append(parts)
                counts = bind(counts + joined(parts, LANES))
            if isa.pairs(width):
                with T.If(rows == T.int64(1)):
                    with T.Then():
                        store_bytes(q, places, integers)
                    with T.Else():
                        store_pairs(q, places, integers)
            else:
                store_bytes(q, places, integers)
            store(step, g, 1, one_step)
            count = bind(intrin("int32", "llvm.vector.reduce.add", counts))
            store(total, g, 1, one_step * cast(count, "float32", 1))
            store(sums, g, 1, count)


def size_bits(value: Expr) -> Expr:
    """Magnitudes as int32. Non-negative floats have the order of their bits, and an integer maximum has no NaN rules.

    Args:
        value: float32x16.
    """
    return bind(reinterpret(value, "int32", LANES) & const(0x7FFFFFFF, "int32", LANES))


def steps_of(largest: Expr, width: int) -> tuple[Expr, Expr]:
    """What a group is multiplied by, and the step of its integers.

    Args:
        largest: int32x16, whose largest number is the largest of ``size_bits``.
        width: bytes of an activation.
    """
    steps = 127 * float(1 << LOW_BITS) ** (width - 1)
    peak = bind(reinterpret(intrin("int32", "llvm.vector.reduce.smax", largest), "float32", 1))
    counts_as_zero = peak < const(SMALLEST_ACTIVATION, "float32")
    zero, limit = const(0, "float32"), const(127, "float32")
    inverse = bind(T.Select(counts_as_zero, zero, limit / peak))
    return inverse, bind(T.Select(counts_as_zero, zero, peak / const(steps, "float32")))


def bytes_of(value: Expr, inverse: Expr, width: int) -> list[Expr]:
    """The integers of a vector: int32 of the high bytes, and perhaps of the low ones.

    Args:
        value: float32x16.
        inverse: the first of ``steps_of``.
        width: bytes of an activation.
    """
    scaled = bind(value * splat(inverse, LANES))
    rounded = bind(T.nearbyint(scaled))
    parts = [bind(cast(rounded, "int32", LANES))]
    if width == 2:
        rest = T.nearbyint((scaled - rounded) * const(float(1 << LOW_BITS), "float32", LANES))
        low = bind(cast(bind(rest), "int32", LANES))
        # A rest of half a step gives 128, which does not fit a signed byte.
        parts.append(bind(T.max(T.min(low, const(127, "int32", LANES)), const(-127, "int32", LANES))))
    return parts


def store_bytes(q: Any, places: list[Expr], integers: list[list[Expr]]) -> None:
    """Store the bytes of integers.

    Args:
        q: int8 buffer.
        places: of the high bytes, and perhaps of the low ones.
        integers: for each vector, what ``bytes_of`` returns.
    """
    for i, parts in enumerate(integers):
        for at, part in zip(places, parts, strict=True):
            store(q, at + i * LANES, LANES, cast(part, "int8", LANES))


def store_pairs(q: Any, places: list[Expr], integers: list[list[Expr]]) -> None:
    """Store 16-bit integers.

    Args:
        q: int8 buffer.
        places: of the integers of even k, and of those of odd k.
        integers: for each vector, what ``bytes_of`` returns.
    """
    for i, parts in enumerate(integers):
        whole = bind(cast(joined(parts, LANES), "int16", LANES))
        for parity, at in enumerate(places):
            words = bind(T.Shuffle([whole], list(range(parity, LANES, 2))))
            store(q, at + i * LANES, LANES, reinterpret(words, "int8", LANES))
