"""What stands between the matrices: embedding, norms, gate, and the head's input."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from mbq_runtime.bundle.slice_profile import SliceProfile

from ..kernels.emit import LANES, Expr, bind, const, fma, load, registers, splat, store
from ..kernels.layout import ROW_BLOCK
from .drivers import call, driver, each, reduce, scratch, view


def embed(profile: SliceProfile, group: int, name: str) -> None:
    """ids i64 [M], weights u8, used f32 [1] -> out f32 [M, K]: rows of a table of ``rows`` at full depth, times the
    float32 [K] at ``scale``.  used: set to 0, for the matrices to add to."""
    tensors = {"ids": ("int64", 1), "weights": ("uint8", 1), "used": ("float32", 1), "out": ("float32", 2)}
    with driver(name, tensors, ("planes", "scales", "scale", "rows")) as args:
        ids, weights, used, out, planes, scales, scale, rows = args
        k = out.shape[1]
        factors = view(weights.at(scale), "float32")
        store(used.flat, 0, 1, T.float32(0))

        def row(m: Expr) -> None:
            call(
                f"gather_d{profile.depths}", weights.at(planes), weights.at(scales), out.at(m * k),
                bind((rows + ROW_BLOCK - 1) // ROW_BLOCK), bind(k // group), load(ids.flat, m, 1),
            )  # fmt: skip
            with T.serial(0, k // LANES) as i:
                at = bind(m * k + i * LANES)
                store(out.flat, at, LANES, load(out.flat, at, LANES) * load(factors, i * LANES, LANES))

        each(ids.shape[0], row)


def norm(eps: float, name: str, *, adds: bool) -> None:
    """x f32 [M, K], (branch f32 [M, K],) weights u8 -> (out_sum = x + branch,) out: the RMS norm of x + branch, times
    the float32 [K] at ``weight``.  K is a multiple of 16."""
    tensors = {"x": ("float32", 2), "weights": ("uint8", 1), "out": ("float32", 2)}
    if adds:
        tensors = {"x": ("float32", 2), "branch": ("float32", 2), "weights": ("uint8", 1), "out_sum": ("float32", 2),
                   "out": ("float32", 2)}  # fmt: skip
    with driver(name, tensors, ("weight",)) as args:
        *values, weight = args
        found = dict(zip(tensors, values, strict=True))
        x, out = found["x"], found["out"]
        rows, k = x.shape
        gain = view(found["weights"].at(weight), "float32")

        def one(m: Expr) -> None:
            squares = registers(LANES, "float32")
            store(squares, 0, LANES, const(0, "float32", LANES))
            summed = found["out_sum"] if adds else x
            with T.serial(0, k // LANES) as i:
                at = bind(m * k + i * LANES)
                value = load(x.flat, at, LANES)
                if adds:
                    value = bind(value + load(found["branch"].flat, at, LANES))
                    store(summed.flat, at, LANES, value)
                store(squares, 0, LANES, fma(value, value, load(squares, 0, LANES)))
            mean = reduce("fadd", load(squares, 0, LANES)) / T.cast(k, "float32")
            scale = bind(splat(T.float32(1) / T.sqrt(mean + T.float32(eps)), LANES))
            with T.serial(0, k // LANES) as i:
                at = bind(m * k + i * LANES)
                store(out.flat, at, LANES, load(summed.flat, at, LANES) * scale * load(gain, i * LANES, LANES))

        each(rows, one)


def last(name: str) -> None:
    """x f32 [M, K] -> out f32 [M', K]: its last M' rows."""
    with driver(name, {"x": ("float32", 2), "out": ("float32", 2)}) as (x, out):
        skipped = bind((x.shape[0] - out.shape[0]) * x.shape[1])
        with T.serial(0, out.shape[0] * out.shape[1] // LANES) as i:
            store(out.flat, i * LANES, LANES, load(x.flat, skipped + i * LANES, LANES))


def gate(activation: str, name: str) -> None:
    """x f32 [M, 2 F] -> out f32 [M, F]: activation of the first half, times the second."""
    with driver(name, {"x": ("float32", 2), "out": ("float32", 2)}) as (x, out):
        rows, f = out.shape
        each(rows, lambda m: call(f"gate_{activation}", x.at(m * (2 * f)), out.at(m * f), f))


def head_input(left: int, right: int, name: str) -> None:
    """x f32 [M, left * right], weights u8 -> out: ``x @ R.T * gain @ R`` with R = kron(L, R'), by its factors.

    Places: float32 L.T [left, left] and L, R' [right, right] and R'.T, gain [left * right].
    """
    tensors = {"x": ("float32", 2), "weights": ("uint8", 1), "out": ("float32", 2)}
    with driver(name, tensors, ("left_back", "left", "right", "right_back", "gain")) as args:
        x, weights, out, *places = args
        left_back, left_table, right_table, right_back, gain = (view(weights.at(p), "float32") for p in places)
        width = left * right

        first, second = scratch(T.int64(width), "float32"), scratch(T.int64(width), "float32")
        with T.serial(0, x.shape[0]) as m:
            # Each step sums rows of what it reads last, which lie one after the other.
            _rows_of_left(left_table, x.flat, m * width, first, left, right)
            _rows_of_right(first, right_back, second, left, right)
            with T.serial(0, T.int64(width)) as i:
                store(second, i, 1, load(second, i, 1) * load(gain, i, 1))
            _rows_of_left(left_back, second, T.int64(0), first, left, right)
            _rows_of_right(first, right_table, second, left, right)
            with T.serial(0, T.int64(width)) as i:
                store(out.flat, m * width + i, 1, load(second, i, 1))


def _rows_of_left(table: Any, x: Any, at: Expr, out: Any, left: int, right: int) -> None:
    """out [left, right] = table [left, left] @ x[at:] [left, right]."""
    with T.serial(0, T.int64(left)) as i:
        with T.serial(0, T.int64(right)) as j:
            store(out, i * right + j, 1, T.float32(0))
        with T.serial(0, T.int64(left)) as k:
            factor = load(table, i * left + k, 1)
            with T.serial(0, T.int64(right)) as j:
                store(out, i * right + j, 1, fma(factor, load(x, at + k * right + j, 1), load(out, i * right + j, 1)))


def _rows_of_right(x: Any, table: Any, out: Any, left: int, right: int) -> None:
    """out [left, right] = x [left, right] @ table [right, right]."""
    with T.serial(0, T.int64(left)) as i:
        with T.serial(0, T.int64(right)) as j:
            store(out, i * right + j, 1, T.float32(0))
        with T.serial(0, T.int64(right)) as k:
            factor = load(x, i * right + k, 1)
            with T.serial(0, T.int64(right)) as j:
                store(out, i * right + j, 1, fma(factor, load(table, k * right + j, 1), load(out, i * right + j, 1)))
