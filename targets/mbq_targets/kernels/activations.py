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
    low_unit = float(1 << LOW_BITS)
    steps = 127 * low_unit ** (width - 1)
    with function(name, pointers, ("groups", "rows")) as args:
        x, q, step, total, sums, groups, rows = args
        with T.serial(0, groups) as g:
            places = bytes_at(g, width, rows, group)
            values = [load(x, g * group + i, LANES) for i in range(0, group, LANES)]
            # Non-negative floats have the order of their bits, and an integer maximum has no NaN rules.
            sizes = [bind(reinterpret(v, "int32", LANES) & const(0x7FFFFFFF, "int32", LANES)) for v in values]
            largest = sizes[0]
            for size in sizes[1:]:
                largest = bind(T.max(largest, size))
            peak = bind(reinterpret(intrin("int32", "llvm.vector.reduce.smax", largest), "float32", 1))
            counts_as_zero = peak < const(SMALLEST_ACTIVATION, "float32")
            zero, limit = const(0, "float32"), const(127, "float32")
            inverse = bind(T.Select(counts_as_zero, zero, limit / peak))
            one_step = bind(T.Select(counts_as_zero, zero, peak / const(steps, "float32")))
            counts, integers = const(0, "int32", LANES), []
            for value in values:
                scaled = bind(value * splat(inverse, LANES))
                rounded = bind(T.nearbyint(scaled))
                parts = [bind(cast(rounded, "int32", LANES))]
                if width == 2:
                    rest = T.nearbyint((scaled - rounded) * const(low_unit, "float32", LANES))
                    low = bind(cast(bind(rest), "int32", LANES))
                    # A rest of half a step gives 128, which does not fit a signed byte.
                    parts.append(bind(T.max(T.min(low, const(127, "int32", LANES)), const(-127, "int32", LANES))))
                integers.append(parts)
                counts = bind(counts + joined(parts, LANES))
            if isa.pairs(width):
                with T.If(rows == T.int64(1)):
                    with T.Then():
                        _store_bytes(q, places, integers)
                    with T.Else():
                        _store_pairs(q, places, integers)
            else:
                _store_bytes(q, places, integers)
            store(step, g, 1, one_step)
            count = bind(intrin("int32", "llvm.vector.reduce.add", counts))
            store(total, g, 1, one_step * cast(count, "float32", 1))
            store(sums, g, 1, count)


def _store_bytes(q: Any, places: list[Expr], integers: list[list[Expr]]) -> None:
    """Store the bytes of a group. integers: for each vector, the high bytes and perhaps the low ones."""
    for i, parts in enumerate(integers):
        for at, part in zip(places, parts, strict=True):
            store(q, at + i * LANES, LANES, cast(part, "int8", LANES))


def _store_pairs(q: Any, places: list[Expr], integers: list[list[Expr]]) -> None:
    """Store a group as 16-bit integers, those of even k at the first place."""
    for i, parts in enumerate(integers):
        whole = bind(cast(joined(parts, LANES), "int16", LANES))
        for parity, at in enumerate(places):
            words = bind(T.Shuffle([whole], list(range(parity, LANES, 2))))
            store(q, at + i * LANES, LANES, reinterpret(words, "int8", LANES))
