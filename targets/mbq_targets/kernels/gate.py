"""The gate of an MLP: the activation of the first half of a row, times the second half."""

from __future__ import annotations

import math
from collections.abc import Callable

from tvm.tirx.script import builder as T

from .emit import LANES, Expr, bind, const, fma, function, load, store
from .exp import sigmoid, tanh


def _silu(x: Expr) -> Expr:
    return bind(x * sigmoid(x, LANES))


def _gelu_tanh(x: Expr) -> Expr:
    cube = bind(x * x * x)
    inner = fma(cube, const(0.044715, "float32", LANES), x) * const(math.sqrt(2 / math.pi), "float32", LANES)
    return bind(const(0.5, "float32", LANES) * x * (const(1, "float32", LANES) + tanh(bind(inner), LANES)))


ACTIVATIONS: dict[str, Callable[[Expr], Expr]] = {"silu": _silu, "gelu_tanh": _gelu_tanh}


def gate(activation: str, name: str) -> None:
    """Kernel: x float32 [2 f] -> y float32 [f]. f is a multiple of 16.

    Args:
        activation: a key of ``ACTIVATIONS``.
        name: the function's symbol.
    """
    with function(name, {"x": "float32", "y": "float32"}, ("f",)) as (x, y, f), T.serial(0, f // LANES) as i:
        at = bind(i * LANES)
        store(y, at, LANES, ACTIVATIONS[activation](load(x, at, LANES)) * load(x, at + f, LANES))
