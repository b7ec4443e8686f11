"""The router's two long sums; the handful of scalars that follow are the shim's."""

from __future__ import annotations

from tvm.tirx.script import builder as T

from .emit import LANES, cast, const, fma, function, load, registers, store

_WAYS = 2  # independent partial sums: hides the latency of the multiply-add


def router_sums(name: str) -> None:
    """x f32 [K], w1 f16 [H, K] -> out f32 [1 + H, 16]: partial sums of x * x, then of w1[h] * x.

    K is a multiple of 32.  The caller adds up each row of 16 in double precision.
    """
    with function(name, {"x": "float32", "w1": "float16", "out": "float32"}, ("k", "h")) as args:
        x, w1, out, k, h = args
        acc = registers(_WAYS * LANES, "float32")

        def row(target: int, weight: object | None, base: object) -> None:
            for way in range(_WAYS):
                store(acc, way * LANES, LANES, const(0, "float32", LANES))
            with T.serial(0, k // (_WAYS * LANES)) as i:
                for way in range(_WAYS):
                    at = i * (_WAYS * LANES) + way * LANES
                    value = load(x, at, LANES)
                    other = value if weight is None else cast(load(w1, base + at, LANES), "float32", LANES)
                    store(acc, way * LANES, LANES, fma(value, other, load(acc, way * LANES, LANES)))
            store(out, target, LANES, load(acc, 0, LANES) + load(acc, LANES, LANES))

        row(0, None, 0)
        with T.serial(0, h) as i:
            row((i + 1) * LANES, w1, i * k)
