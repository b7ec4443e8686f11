"""Activations to int8, per token and group, bit for bit as the numpy reference does it."""

from __future__ import annotations

from tvm.tirx.script import builder as T

from .emit import LANES, bind, cast, const, function, intrin, load, reinterpret, splat, store


def quantize(group: int, name: str) -> None:
    """x f32 [groups * group] -> q i8 (same shape), step f32 [groups], total f32 [groups] = step * sum of q.

    ``step = max|x| / 127``, ``q = round(x * (127 / max|x|))`` to even; a group of zeros gives zeros.
    """
    parts = group // LANES
    with function(name, {"x": "float32", "q": "int8", "step": "float32", "total": "float32"}, ("groups",)) as args:
        x, q, step, total, groups = args
        with T.serial(0, groups) as g:
            values = [load(x, g * group + LANES * i, LANES) for i in range(parts)]
            # The bits of non-negative floats order as integers do: an integer maximum needs no NaN rules.
            sizes = [bind(reinterpret(v, "int32", LANES) & const(0x7FFFFFFF, "int32", LANES)) for v in values]
            largest = sizes[0]
            for size in sizes[1:]:
                largest = bind(T.max(largest, size))
            peak = bind(reinterpret(intrin("int32", "llvm.vector.reduce.smax", largest), "float32", 1))
            limit = const(127, "float32")
            inverse = bind(T.Select(peak > const(0, "float32"), limit / peak, const(0, "float32")))
            counts = const(0, "int32", LANES)
            for i, value in enumerate(values):
                rounded = bind(cast(T.nearbyint(value * splat(inverse, LANES)), "int32", LANES))
                store(q, g * group + LANES * i, LANES, cast(rounded, "int8", LANES))
                counts = bind(counts + rounded)
            one_step = bind(peak / limit)
            store(step, g, 1, one_step)
            store(total, g, 1, one_step * cast(intrin("int32", "llvm.vector.reduce.add", counts), "float32", 1))
