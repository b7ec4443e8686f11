"""The two long sums of a router. The caller computes the few scalars that follow."""

from __future__ import annotations

from collections.abc import Sequence

from tvm.tirx.script import builder as T

from .emit import LANES, Expr, bind, cast, const, fma, function, load, registers, store

_WAYS = 2
"""Independent partial sums. They hide the latency of the multiply-add."""

_ROWS = 4
"""Rows of w1 that share the loads of x."""

STEP = _WAYS * LANES
"""A router's input width is a multiple of this."""


def router_sums(name: str) -> None:
    """Kernel: partial sums of x * x, then of w1[h] * x. The caller adds up each row of 16 in double precision.

    Kernel arguments: x float32 [k]; w1 float16 [h, k]; out float32 [1 + h, 16]; k, a multiple of ``STEP``; h.

    Args:
        name: the function's symbol.
    """
    with function(name, {"x": "float32", "w1": "float16", "out": "float32"}, ("k", "h")) as args:
        x, w1, out, k, h = args
        acc = registers(_ROWS * _WAYS * LANES, "float32")

        def rows(target: Expr, bases: Sequence[Expr | None]) -> None:
            """The sums of the rows of w1 that begin at ``bases``. None is x itself."""
            places = [[(r * _WAYS + way) * LANES for way in range(_WAYS)] for r in range(len(bases))]
            for place in (at for row in places for at in row):
                store(acc, place, LANES, const(0, "float32", LANES))
            with T.serial(0, k // STEP) as i:
                for way in range(_WAYS):
                    at = bind(i * STEP + way * LANES)
                    value = load(x, at, LANES)
                    for base, row in zip(bases, places, strict=True):
                        other = value if base is None else cast(load(w1, base + at, LANES), "float32", LANES)
                        store(acc, row[way], LANES, fma(value, other, load(acc, row[way], LANES)))
            for r, row in enumerate(places):
                store(out, (target + r) * LANES, LANES, load(acc, row[0], LANES) + load(acc, row[1], LANES))

        rows(T.int64(0), [None])
        whole = bind(h // _ROWS)
        with T.serial(0, whole) as block:
            rows(1 + block * _ROWS, [bind((block * _ROWS + r) * k) for r in range(_ROWS)])
        with T.serial(0, h - whole * _ROWS) as rest:
            rows(1 + whole * _ROWS + rest, [bind((whole * _ROWS + rest) * k)])
