"""Activations to integers of one or two bytes, per token and group, bit for bit as the numpy reference does it."""

from __future__ import annotations

from tvm.tirx.script import builder as T

from .emit import LANES, Expr, bind, cast, const, function, intrin, load, reinterpret, splat, store

LOW_BITS = 8
"""Of an activation's two bytes, the high one counts this power of two of the low one's units."""

TILE_K = 512
"""Weights along K of one tile of prefill, and activations of a token that lie side by side."""

SMALLEST = 1e-30
"""A group below this counts as zero: the inverse of its step would be infinite."""


def chunks(groups: Expr, group: int) -> Expr:
    """How many tiles ``groups`` groups span."""
    return bind((groups + (TILE_K // group - 1)) // (TILE_K // group))


def bytes_at(g: Expr, width: int, rows: Expr, group: int) -> list[Expr]:
    """Where each byte of group ``g`` lies behind its token's first, high before low.

    q is [chunks][width][rows][TILE_K], width the bytes of an activation.  The activations of a tile are one run of
    memory for all tokens: rows of K apart, which is often a power of two, would meet in a few sets of the cache.
    """
    per_tile = TILE_K // group
    return [bind(((g // per_tile) * width + byte) * rows * TILE_K + (g % per_tile) * group) for byte in range(width)]


def joined(of_bytes: list[Expr], lanes: int) -> Expr:
    """int32 sums of products with each byte, high before low -> those with the integers."""
    total = of_bytes[0]
    for low in of_bytes[1:]:
        total = bind((total << const(LOW_BITS, "int32", lanes)) + low)
    return total


def quantize(group: int, width: int, name: str) -> None:
    """One token: x f32 [groups * group] -> q i8, laid out as ``bytes_at`` says for ``rows`` tokens, step f32 [groups],
    total f32 [groups] = step * sum of integers.

    An integer is one byte, or ``(high << LOW_BITS) + low``.
    """
    pointers = {"x": "float32", "q": "int8", "step": "float32", "total": "float32"}
    low_unit = float(1 << LOW_BITS)
    steps = 127 * low_unit ** (width - 1)
    with function(name, pointers, ("groups", "rows")) as args:
        x, q, step, total, groups, rows = args
        with T.serial(0, groups) as g:
            places = bytes_at(g, width, rows, group)
            values = [load(x, g * group + i, LANES) for i in range(0, group, LANES)]
            # The bits of non-negative floats order as integers do: an integer maximum needs no NaN rules.
            sizes = [bind(reinterpret(v, "int32", LANES) & const(0x7FFFFFFF, "int32", LANES)) for v in values]
            largest = sizes[0]
            for size in sizes[1:]:
                largest = bind(T.max(largest, size))
            peak = bind(reinterpret(intrin("int32", "llvm.vector.reduce.smax", largest), "float32", 1))
            counts_as_zero = peak < const(SMALLEST, "float32")
            zero, limit = const(0, "float32"), const(127, "float32")
            inverse = bind(T.Select(counts_as_zero, zero, limit / peak))
            one_step = bind(T.Select(counts_as_zero, zero, peak / const(steps, "float32")))
            counts = const(0, "int32", LANES)
            for i, value in enumerate(values):
                scaled = bind(value * splat(inverse, LANES))
                rounded = bind(T.nearbyint(scaled))
                parts = [bind(cast(rounded, "int32", LANES))]
                if width == 2:
                    rest = T.nearbyint((scaled - rounded) * const(low_unit, "float32", LANES))
                    low = bind(cast(bind(rest), "int32", LANES))
                    # Half a step either way would make 128, which does not fit.
                    parts.append(bind(T.max(T.min(low, const(127, "int32", LANES)), const(-127, "int32", LANES))))
                for at, part in zip(places, parts, strict=True):
                    store(q, at + i * LANES, LANES, cast(part, "int8", LANES))
                counts = bind(counts + joined(parts, LANES))
            store(step, g, 1, one_step)
            store(total, g, 1, one_step * cast(intrin("int32", "llvm.vector.reduce.add", counts), "float32", 1))
