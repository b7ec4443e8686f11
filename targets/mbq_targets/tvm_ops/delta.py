"""The gated delta net between its two linear layers. ``mbq_export.format.delta`` defines it.

The heads of values are independent, and so are the columns of a memory. So each LANES columns of a memory go through
all tokens of a pass by themselves, and stay in the cache of one core meanwhile.
"""

from __future__ import annotations

import math
from typing import Any

from tvm.tirx.script import builder as T

from ..constants import UNIT_EPS
from ..kernels.emit import LANES, Expr, bind, cast, const, fma, load, registers, splat, store
from ..kernels.gate import ACTIVATIONS
from ..spec import DeltaNet
from .drivers import Tensor, driver, each, reduce, scratch, view

_CHAINS = 4
"""Sums of products that take turns, which hides the latency of a multiply-add."""

_GATES = 2
"""Numbers of a token and head beside the channels: its decay, and its strength."""


FIELDS = ("layer", "taps", "rate", "step", "gain")
"""Names of the operation's integers: index of the states, and places in the weights in bytes."""

_silu = ACTIVATIONS["silu"]


def delta(shape: DeltaNet, norm_eps: float, name: str) -> None:
    """Operation: stacked float32 [M, W] -> out float32 [M, value_heads * value_dim].

    A row of ``stacked`` has the parts of ``DeltaNet.sizes``; W may be larger. Arguments: states
    float32 [layers, taps - 1, channels], what is convolved of the last tokens, the newest last, and memories float32
    [layers, value_heads, key_dim, value_dim], which the operation brings up to date; weights uint8; ``FIELDS``: places
    of float32 taps [taps, channels], the newest token last, rate and step [value_heads], and gain [value_dim].

    Args:
        shape: the net.
        norm_eps: added to the mean square in the norm of what is read.
        name: the function's symbol.
    """
    tensors = {
        "stacked": ("float32", 2), "states": ("float32", 3), "memories": ("float32", 4), "weights": ("uint8", 1),
        "out": ("float32", 2),
    }  # fmt: skip
    with driver(name, tensors, FIELDS) as args:
        stacked, states, memories, weights, out, layer, *places = args
        s = shape
        taps, rate, step, gain = (view(weights.at(place), "float32") for place in places)
        rows, width = stacked.shape
        held, channels = s.taps - 1, s.channels
        state, vectors = bind(layer * (held * channels)), T.int64(channels // LANES)
        # What is convolved: of the tokens before the pass, then of those of the pass.
        seen = scratch((rows + held) * channels, "float32")
        convolved = scratch(rows * channels, "float32")
        gates = scratch(rows * (s.value_heads * _GATES), "float32")
        with T.serial(0, held * vectors) as i:
            store(seen, i * LANES, LANES, load(states.flat, state + i * LANES, LANES))

        def enter(m: Expr) -> None:
            with T.serial(0, vectors) as i:
                value = load(stacked.flat, m * width + i * LANES, LANES)
                store(seen, (m + held) * channels + i * LANES, LANES, value)

        def convolve(m: Expr) -> None:
            with T.serial(0, vectors) as i:
                total = const(0, "float32", LANES)
                for tap in range(s.taps):
                    value = load(seen, (m + tap) * channels + i * LANES, LANES)
                    total = fma(load(taps, tap * channels + i * LANES, LANES), value, total)
                at = bind(m * channels + i * LANES)
                store(convolved, at, LANES, total)
                store(convolved, at, LANES, _silu(load(convolved, at, LANES)))
            for first, size in ((0, 1 / math.sqrt(s.key_dim)), (s.keys, 1.0)):
                with T.serial(0, T.int64(s.key_heads)) as h:
                    _to_length(convolved, bind(m * channels + first + h * s.key_dim), s.key_dim, size)
            with T.serial(0, T.int64(s.value_heads)) as h:
                at = bind(m * width + channels + s.values + h)
                _gate(stacked, at, s.value_heads, (rate, step), h, gates, bind((m * s.value_heads + h) * _GATES))

        def finish(m: Expr) -> None:
            with T.serial(0, T.int64(s.value_heads)) as h:
                at = bind((m * s.value_heads + h) * s.value_dim)
                z = bind(m * width + channels + h * s.value_dim)
                inverse = _inverse_root(out.flat, at, s.value_dim, 1 / s.value_dim, norm_eps)
                for d in range(0, s.value_dim, LANES):
                    normed = bind(load(out.flat, at + d, LANES) * inverse * load(gain, d, LANES))
                    store(out.flat, at + d, LANES, normed * _silu(load(stacked.flat, z + d, LANES)))

        each(rows, enter)
        each(rows, convolve)
        with T.serial(0, held * vectors) as i:
            store(states.flat, state + i * LANES, LANES, load(seen, rows * channels + i * LANES, LANES))
        stripes = s.value_dim // LANES
        with T.parallel(0, T.int64(s.value_heads * stripes)) as i:
            head = bind(T.truncdiv(i, T.int64(stripes)))
            _remember(s, convolved, gates, layer, head, bind((i - head * stripes) * LANES), memories, out)
        each(rows, finish)


def _inverse_root(x: Any, at: Expr, width: int, scale: float, eps: float) -> Expr:
    """1 / sqrt(scale * the sum of squares + eps), in all lanes."""
    squares = const(0, "float32", LANES)
    for d in range(0, width, LANES):
        value = load(x, at + d, LANES)
        squares = fma(value, value, squares)
    total = reduce("fadd", squares) * T.float32(scale) + T.float32(eps)
    return bind(splat(T.float32(1) / T.sqrt(total), LANES))


def _to_length(x: Any, at: Expr, width: int, length: float) -> None:
    """Give the vector at ``x[at]`` a length, in place."""
    inverse = bind(_inverse_root(x, at, width, 1.0, UNIT_EPS) * const(length, "float32", LANES))
    for d in range(0, width, LANES):
        store(x, at + d, LANES, load(x, at + d, LANES) * inverse)


def _gate(stacked: Tensor, at: Expr, heads: int, factors: tuple[Any, Any], head: Expr, gates: Any, place: Expr) -> None:
    """Write decay and strength of a token and head. at: its strength in ``stacked``; its decay is ``heads`` behind."""
    one, zero = T.float64(1), T.float64(0)

    def exact(buffer: Any, index: Expr) -> Expr:
        return bind(cast(load(buffer, index, 1), "float64", 1))

    rate, step = (exact(factor, head) for factor in factors)
    x = bind(exact(stacked.flat, at + heads) + step)
    positive = bind(T.max(x, zero))
    softplus = bind(positive + T.log(one + T.exp(x - positive - positive)))
    store(gates, place, 1, cast(T.exp(rate * softplus), "float32", 1))
    strength = one / (one + T.exp(zero - exact(stacked.flat, at)))
    store(gates, place + 1, 1, cast(strength, "float32", 1))


def _remember(
    s: DeltaNet, convolved: Any, gates: Any, layer: Expr, head: Expr, column: Expr, memories: Tensor, out: Tensor
) -> None:
    """LANES columns of a head's memory, from ``column`` on, over all tokens."""
    rows = out.shape[0]
    memory = bind((layer * s.value_heads + head) * (s.key_dim * s.value_dim) + column)
    key_head = bind(T.truncdiv(head, T.int64(s.value_heads // s.key_heads)))
    # Values go through memory: TVM's simplifier replaces each use of a bound value by its expression.
    chains, fixed = registers(_CHAINS * LANES, "float32"), registers(2 * LANES, "float32")

    def column_of(d: Expr) -> Expr:
        return memory + d * s.value_dim

    def summed() -> Expr:
        sides = [load(chains, chain * LANES, LANES) + load(chains, (chain + 1) * LANES, LANES) for chain in (0, 2)]
        return bind(sides[0] + sides[1])

    with T.serial(0, rows) as m:
        query = bind(m * s.channels + key_head * s.key_dim)
        gate = bind((m * s.value_heads + head) * _GATES)
        store(fixed, 0, LANES, splat(load(gates, gate, 1), LANES))
        for chain in range(_CHAINS):
            store(chains, chain * LANES, LANES, const(0, "float32", LANES))
        with T.serial(0, T.int64(s.key_dim // _CHAINS)) as part:
            for chain in range(_CHAINS):
                d = bind(part * _CHAINS + chain)
                key = splat(load(convolved, query + s.keys + d, 1), LANES)
                total = fma(key, load(memories.flat, column_of(d), LANES), load(chains, chain * LANES, LANES))
                store(chains, chain * LANES, LANES, total)
        value = load(convolved, m * s.channels + 2 * s.keys + head * s.value_dim + column, LANES)
        change = bind(value - summed() * load(fixed, 0, LANES))
        store(fixed, LANES, LANES, change * splat(load(gates, gate + 1, 1), LANES))
        for chain in range(_CHAINS):
            store(chains, chain * LANES, LANES, const(0, "float32", LANES))
        with T.serial(0, T.int64(s.key_dim // _CHAINS)) as part:
            for chain in range(_CHAINS):
                d = bind(part * _CHAINS + chain)
                key = splat(load(convolved, query + s.keys + d, 1), LANES)
                kept = bind(load(memories.flat, column_of(d), LANES) * load(fixed, 0, LANES))
                store(memories.flat, column_of(d), LANES, fma(key, load(fixed, LANES, LANES), kept))
                asked = splat(load(convolved, query + d, 1), LANES)
                total = fma(asked, load(memories.flat, column_of(d), LANES), load(chains, chain * LANES, LANES))
                store(chains, chain * LANES, LANES, total)
        store(out.flat, m * s.values + head * s.value_dim + column, LANES, summed())
