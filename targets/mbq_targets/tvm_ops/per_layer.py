"""Per-layer embeddings between their linear layers, see ``mbq_export.format.per_layer``."""

from __future__ import annotations

from tvm.tirx.script import builder as T

from ..kernels.emit import LANES, Expr, bind, const, fma, load, registers, splat, store
from ..kernels.gate import ACTIVATIONS
from .drivers import driver, each, reduce, view


def per_layer(eps: float, activation: str, name: str) -> None:
    """Operation: gate, given float32 [M, F] -> out = activation(gate) * (RMS norm of given + rows of the block).

    Other arguments: rows float32 [M, blocks * F]; weights uint8; first, the block's first column of rows; gain, place
    in the weights in bytes of float32 [F], which the norm multiplies by. F is a multiple of 16.

    Args:
        eps: added to the mean square.
        activation: a key of ``kernels.gate.ACTIVATIONS``.
        name: the function's symbol.
    """
    tensors = {
        "gate": ("float32", 2), "given": ("float32", 2), "rows": ("float32", 2), "weights": ("uint8", 1),
        "out": ("float32", 2),
    }  # fmt: skip
    with driver(name, tensors, ("first", "gain")) as args:
        gate, given, rows, weights, out, first, place = args
        count, size = out.shape
        width = rows.shape[1]
        gain = view(weights.at(place), "float32")

        def one(m: Expr) -> None:
            squares = registers(LANES, "float32")
            store(squares, 0, LANES, const(0, "float32", LANES))
            with T.serial(0, size // LANES) as i:
                value = load(given.flat, bind(m * size + i * LANES), LANES)
                store(squares, 0, LANES, fma(value, value, load(squares, 0, LANES)))
            mean = reduce("fadd", load(squares, 0, LANES)) / T.cast(size, "float32")
            scale = bind(splat(T.float32(1) / T.sqrt(mean + T.float32(eps)), LANES))
            with T.serial(0, size // LANES) as i:
                at = bind(m * size + i * LANES)
                row = load(rows.flat, m * width + first + i * LANES, LANES)
                # The sum goes through memory: TVM's simplifier replaces each use of a bound value by its expression.
                store(out.flat, at, LANES, load(given.flat, at, LANES) * scale * load(gain, i * LANES, LANES) + row)
                opened = ACTIVATIONS[activation](load(gate.flat, at, LANES))
                store(out.flat, at, LANES, opened * load(out.flat, at, LANES))

        each(count, one)
