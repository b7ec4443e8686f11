"""Activations to int8, per token and group, bit for bit as the numpy reference does it."""

from __future__ import annotations

from tvm.tirx.script import builder as T

from .emit import LANES, bind, cast, const, fma, function, intrin, load, registers, reinterpret, splat, store

TERMS = 2
"""Int8 terms per activation; each further one holds the rounding error of those before it."""

SMALLEST = 1e-30
"""A group below this counts as zero: the inverse of its step would be infinite."""


def quantize(group: int, name: str) -> None:
    """x f32 [groups * group] -> q i8 (same shape), step f32 [groups], total f32 [groups] = step * sum of q.

    ``step = max|x| / 127``, ``q = round(x * (127 / max|x|))`` to even.  Term t of group g goes to
    group ``t * apart + g`` of q, step and total.
    """
    vectors = [LANES * i for i in range(group // LANES)]
    pointers = {"x": "float32", "q": "int8", "step": "float32", "total": "float32"}
    with function(name, pointers, ("groups", "apart")) as args:
        x, q, step, total, groups, apart = args
        rest = registers(group, "float32")
        with T.serial(0, groups) as first:
            for at in vectors:
                store(rest, at, LANES, load(x, first * group + at, LANES))
            with T.serial(0, TERMS) as term:
                g = bind(term * apart + first)
                values = [load(rest, at, LANES) for at in vectors]
                # The bits of non-negative floats order as integers do: an integer maximum needs no NaN rules.
                sizes = [bind(reinterpret(v, "int32", LANES) & const(0x7FFFFFFF, "int32", LANES)) for v in values]
                largest = sizes[0]
                for size in sizes[1:]:
                    largest = bind(T.max(largest, size))
                peak = bind(reinterpret(intrin("int32", "llvm.vector.reduce.smax", largest), "float32", 1))
                counts_as_zero = peak < const(SMALLEST, "float32")
                zero, limit = const(0, "float32"), const(127, "float32")
                inverse = bind(T.Select(counts_as_zero, zero, limit / peak))
                one_step = bind(T.Select(counts_as_zero, zero, peak / limit))
                counts = const(0, "int32", LANES)
                for at, value in zip(vectors, values, strict=True):
                    rounded = bind(T.nearbyint(value * splat(inverse, LANES)))
                    whole = bind(cast(rounded, "int32", LANES))
                    store(q, g * group + at, LANES, cast(whole, "int8", LANES))
                    counts = bind(counts + whole)
                    store(rest, at, LANES, fma(rounded, splat(zero - one_step, LANES), value))
                store(step, g, 1, one_step)
                store(total, g, 1, one_step * cast(intrin("int32", "llvm.vector.reduce.add", counts), "float32", 1))
