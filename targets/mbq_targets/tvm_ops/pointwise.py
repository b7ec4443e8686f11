"""The operations between the matrices: embedding, norms, gate, and the rotation of the head's input."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from mbq_runtime.bundle.layout import ROW_BLOCK
from mbq_runtime.bundle.slice_profile import SliceProfile

from ..kernels.emit import LANES, Expr, bind, cast, const, fma, load, registers, splat, store
from ..kernels.exp import tanh
from .drivers import call, driver, each, matrix_at, matrix_fields, reduce, scratch, view


def embed(profile: SliceProfile, group: int, name: str) -> None:
    """Operation: ids int64 [M] -> out float32 [M, K], rows of a table times float32 [K] at ``scale``.

    They are read at full depth, or at the deepest one of this pass. Other arguments: avg_bits float32 [2], average
    bits and the deepest depth; weights uint8; used float32 [1], which is set to 0 before the matrices add to it; the
    table's ``matrix_fields`` and scale, places in the weights in bytes; rows of the table.

    Args:
        profile: bits of each slice.
        group: weights that share a scale.
        name: the function's symbol.
    """
    tensors = {
        "ids": ("int64", 1), "avg_bits": ("float32", 1), "weights": ("uint8", 1), "used": ("float32", 1),
        "out": ("float32", 2),
    }  # fmt: skip
    with driver(name, tensors, (*matrix_fields(profile), "scale", "rows")) as args:
        ids, avg_bits, weights, used, out, *places, scale, rows = args
        most = bind(cast(load(avg_bits.flat, 1, 1), "int32", 1))
        matrix = matrix_at(weights, places)
        k = out.shape[1]
        factors = view(weights.at(scale), "float32")
        store(used.flat, 0, 1, T.float32(0))

        def row(m: Expr) -> None:
            for d in range(1, profile.depths + 1):
                with T.If(most == d if d < profile.depths else most >= d), T.Then():
                    call(
                        f"gather_d{d}", *matrix(), out.at(m * k),
                        bind((rows + ROW_BLOCK - 1) // ROW_BLOCK), bind(k // group), load(ids.flat, m, 1),
                    )  # fmt: skip
            with T.serial(0, k // LANES) as i:
                at = bind(m * k + i * LANES)
                store(out.flat, at, LANES, load(out.flat, at, LANES) * load(factors, i * LANES, LANES))

        each(ids.shape[0], row)


def norm(eps: float, name: str, *, adds: bool) -> None:
    """Operation: x float32 [M, K] -> out, its RMS norm times float32 [K] at ``weight``. K is a multiple of 16.

    Args:
        eps: added to the mean square.
        name: the function's symbol.
        adds: take branch float32 [M, K] too, write out_sum = x + branch, and norm that.
    """
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


def add(name: str) -> None:
    """Operation: x, branch float32 [M, K] -> out = x + branch. K is a multiple of 16.

    Args:
        name: the function's symbol.
    """
    with driver(name, {"x": ("float32", 2), "branch": ("float32", 2), "out": ("float32", 2)}) as (x, branch, out):
        vectors = x.shape[0] * x.shape[1] // LANES
        with T.serial(0, vectors) as i:
            store(out.flat, i * LANES, LANES, load(x.flat, i * LANES, LANES) + load(branch.flat, i * LANES, LANES))


def scale(name: str) -> None:
    """Operation: x, branch float32 [M, K] -> out = (x + branch) * a number. K is a multiple of 16.

    Other arguments: weights uint8; factor, place in it in bytes of the float32 number.

    Args:
        name: the function's symbol.
    """
    tensors = {"x": ("float32", 2), "branch": ("float32", 2), "weights": ("uint8", 1), "out": ("float32", 2)}
    with driver(name, tensors, ("factor",)) as (x, branch, weights, out, place):
        factor = bind(splat(load(view(weights.at(place), "float32"), 0, 1), LANES))
        vectors = x.shape[0] * x.shape[1] // LANES
        with T.serial(0, vectors) as i:
            summed = load(x.flat, i * LANES, LANES) + load(branch.flat, i * LANES, LANES)
            store(out.flat, i * LANES, LANES, summed * factor)


def cap(limit: float, name: str) -> None:
    """Operation: x float32 [M, N] -> out = limit * tanh(x / limit). N is a multiple of 16.

    Args:
        limit: the largest value that is reached.
        name: the function's symbol.
    """
    with driver(name, {"x": ("float32", 2), "out": ("float32", 2)}) as (x, out):
        vectors = x.shape[0] * x.shape[1] // LANES
        with T.serial(0, vectors) as i:
            small = bind(load(x.flat, i * LANES, LANES) * const(1 / limit, "float32", LANES))
            store(out.flat, i * LANES, LANES, tanh(small, LANES) * const(limit, "float32", LANES))


def convolution(taps: int, name: str, *, bias: bool) -> None:
    """Operation: stacked float32 [M, 3 K], b then c then x -> out float32 [M, K] = c * (convolution of b * x).

    Arguments: states float32 [layers, taps - 1, K], b * x of the last tokens, the newest last, which the operation
    brings up to date; weights uint8; layer, index of the state; place in the weights of float32 [taps, K], the newest
    token last, and of the bias, float32 [K], if there is one. K is a multiple of 16.

    Args:
        taps: tokens that the convolution sees.
        name: the function's symbol.
        bias: whether there is one.
    """
    tensors = {"stacked": ("float32", 2), "states": ("float32", 3), "weights": ("uint8", 1), "out": ("float32", 2)}
    with driver(name, tensors, ("layer", "taps", *(("bias",) if bias else ()))) as args:
        stacked, states, weights, out, layer, place, *bias_place = args
        (rows, k), held = out.shape, taps - 1
        factors = view(weights.at(place), "float32")
        biases = [view(weights.at(p), "float32") for p in bias_place]
        state = bind(layer * (held * k))
        # b * x of the tokens before the pass, then of those of the pass.
        seen = scratch((rows + held) * k, "float32")
        vectors = k // LANES
        with T.serial(0, held * vectors) as i:
            store(seen, i * LANES, LANES, load(states.flat, state + i * LANES, LANES))

        def enter(m: Expr) -> None:
            with T.serial(0, vectors) as i:
                at = bind(m * (3 * k) + i * LANES)
                product = load(stacked.flat, at, LANES) * load(stacked.flat, at + 2 * k, LANES)
                store(seen, (m + held) * k + i * LANES, LANES, product)

        def convolve(m: Expr) -> None:
            with T.serial(0, vectors) as i:
                total = load(biases[0], i * LANES, LANES) if biases else const(0, "float32", LANES)
                for tap in range(taps):
                    value = load(seen, (m + tap) * k + i * LANES, LANES)
                    total = fma(load(factors, tap * k + i * LANES, LANES), value, total)
                c = load(stacked.flat, m * (3 * k) + k + i * LANES, LANES)
                store(out.flat, m * k + i * LANES, LANES, total * c)

        each(rows, enter)
        each(rows, convolve)
        with T.serial(0, held * vectors) as i:
            store(states.flat, state + i * LANES, LANES, load(seen, rows * k + i * LANES, LANES))


def last(name: str) -> None:
    """Operation: x float32 [M, K] -> out float32 [M', K], its last M' rows.

    Args:
        name: the function's symbol.
    """
    with driver(name, {"x": ("float32", 2), "out": ("float32", 2)}) as (x, out):
        skipped = bind((x.shape[0] - out.shape[0]) * x.shape[1])
        with T.serial(0, out.shape[0] * out.shape[1] // LANES) as i:
            store(out.flat, i * LANES, LANES, load(x.flat, skipped + i * LANES, LANES))


def gate(activation: str, name: str) -> None:
    """Operation: x float32 [M, 2 F] -> out float32 [M, F], the activation of the first half times the second half.

    Args:
        activation: a key of ``kernels.gate.ACTIVATIONS``.
        name: the function's symbol.
    """
    with driver(name, {"x": ("float32", 2), "out": ("float32", 2)}) as (x, out):
        rows, f = out.shape
        each(rows, lambda m: call(f"gate_{activation}", x.at(m * (2 * f)), out.at(m * f), f))


def head_input(left: int, right: int, name: str) -> None:
    """Operation: x float32 [M, left * right] -> out = ``x @ R.T * gain @ R`` with R = kron(L, R'), by its factors.

    Other arguments: weights uint8; places in it of float32 L.T [left, left], L, R' [right, right], R'.T and gain
    [left * right].

    Args:
        left: size of L.
        right: size of R'.
        name: the function's symbol.
    """
    tensors = {"x": ("float32", 2), "weights": ("uint8", 1), "out": ("float32", 2)}
    with driver(name, tensors, ("left_back", "left", "right", "right_back", "gain")) as args:
        x, weights, out, *places = args
        left_back, left_table, right_table, right_back, gain = (view(weights.at(p), "float32") for p in places)
        width = left * right

        first, second = scratch(T.int64(width), "float32"), scratch(T.int64(width), "float32")
        with T.serial(0, x.shape[0]) as m:
            # The inner loop of each step reads neighbouring numbers.
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
