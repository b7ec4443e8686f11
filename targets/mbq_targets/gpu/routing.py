"""Norms, gates and routers: the work that is done once for each token.

One work-group handles a token. A router needs sums over the numbers that its norm or gate reads, so a kernel does both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.tirx.script import builder as T

from mbq_runtime.bundle.slice_profile import SliceProfile

from ..constants import MEAN_SQUARE_EPS
from ..kernels.emit import Expr, bind, cast, const, reinterpret
from .kernel import (
    COUNT,
    DEEPEST,
    ROW,
    THRESHOLDS,
    TOKENS,
    Item,
    Kernel,
    barrier,
    element,
    frame,
    half_to_float,
    put,
    reduce_sums,
    registers,
    shared,
    spread,
    strided,
    when,
)


@dataclass(frozen=True)
class RouterShape:
    """A router.

    profile: bits of each slice.
    hidden: width of a learned router, a multiple of LEARNED_STEP. 0 for the norm rule.
    """

    profile: SliceProfile
    hidden: int

    def __post_init__(self) -> None:
        if self.hidden % LEARNED_STEP:
            raise ValueError(f"a learned router of width {self.hidden}: needed a multiple of {LEARNED_STEP}")

    @property
    def steps(self) -> int:
        """Scores: one for each depth except the first."""
        return self.profile.depths - 1

    @property
    def parameters(self) -> int:
        """Numbers of the buffer ``parameters``."""
        return 2 + 2 * self.steps + self.hidden * (1 + self.steps)

    def pack(
        self, share: float, table: int, bias: Floats, gain: Floats, *, b1: Floats | None, w2: Floats | None
    ) -> Floats:
        """The buffer ``parameters``, float32.

        Args:
            share: share of the matrix in all routed weights.
            table: number of its table of thresholds.
            bias: float32 [steps].
            gain: float32 [steps].
            b1: float32 [hidden], or None for the norm rule.
            w2: float32 [steps, hidden], or None for the norm rule.
        """
        parts = [np.array([share, table]), bias, gain]
        if self.hidden and b1 is not None and w2 is not None:
            parts += [b1, w2.reshape(-1)]
        return np.concatenate(parts).astype(np.float32)


Floats = NDArray[np.float32]
Buffers = dict[str, Any]

LEARNED_STEP = 8
"""The width of a learned router is a multiple of this. Its weights are loaded as vectors of four pairs."""


def pack_w1(w1: NDArray[np.float16]) -> NDArray[np.uint32]:
    """uint32 [k, hidden / 2]: row h of w1 in the low half of word h, row h + hidden / 2 in the high half.

    A work-item reads all rows of its column together, and its neighbour reads the next column.

    Args:
        w1: float16 [hidden, k].
    """
    low, high = np.split(np.ascontiguousarray(w1.T), 2, axis=1)
    return np.ascontiguousarray(np.stack([low, high], axis=2)).view("<u4")[..., 0]


def _router_buffers(shape: RouterShape, k: int, tokens: int) -> dict[str, tuple[str, int]]:
    buffers = {"parameters": ("float32", shape.parameters)}
    if shape.hidden:
        buffers["w1"] = ("uint32x4", shape.hidden * k // LEARNED_STEP)
    return buffers | {"routing": ("int32", 2 * tokens), "state": ("int32", TOKENS + tokens)}


def _sums(
    item: Item, threads: int, k: int, shape: RouterShape | None, of: Buffers, visit: Callable[[Expr], Expr]
) -> Any:
    """Sums over k of v * v, then of w1[h] * v. visit: column -> v."""
    quads = shape.hidden // LEARNED_STEP if shape else 0
    squares, learned = registers(1), registers(max(2 * quads, 1), "float32x4")
    put(squares, 0, const(0, "float32"))
    for i in range(2 * quads):
        put(learned, i, const(0, "float32", 4))
    with strided(item, k, threads) as column:
        v = bind(visit(column))
        put(squares, 0, squares[0] + v * v)
        for i in range(quads):
            words = bind(of["w1"][column * quads + i])
            halves = (words & const(0xFFFF, "uint32", 4), words >> const(16, "uint32", 4))
            for at, half in zip((i, quads + i), halves, strict=True):
                put(learned, at, learned[at] + half_to_float(bind(half), 4) * spread(v, 4))
    vectors = [bind(learned[i]) for i in range(2 * quads)]
    return reduce_sums(item, threads, [squares[0], *(element(v, i, 4) for v in vectors for i in range(4))])


def _decide(item: Item, k: int, shape: RouterShape, of: Buffers, sums: Any, token: Expr, place: Expr) -> None:
    """Write the depth to row ``place`` of ``routing``. Add its weighted bits to those that ``token`` has used."""
    parameters, steps, hidden = of["parameters"], shape.steps, shape.hidden
    with when(item.thread == 0):
        ms = bind(sums[0] * const(1 / k, "float32") + const(MEAN_SQUARE_EPS, "float32"))
        log_ms, inverse = bind(T.log(ms)), bind(const(1, "float32") / T.sqrt(ms))
        scores = registers(max(steps, 1))
        for e in range(steps):
            put(scores, e, parameters[2 + e] + parameters[2 + steps + e] * log_ms)
        first = 2 + 2 * steps
        for h in range(hidden):
            pre = bind(sums[1 + h] * inverse + parameters[first + h])
            active = bind(pre / (const(1, "float32") + T.exp(const(0, "float32") - pre)))
            for e in range(steps):
                put(scores, e, scores[e] + parameters[first + hidden + e * hidden + h] * active)
        depth, passing = registers(1, "int32"), registers(1, "int32")
        put(depth, 0, T.int32(1))
        put(passing, 0, T.int32(1))
        if steps:
            word = bind(of["state"][THRESHOLDS + cast(parameters[1], "int32", 1)])
            threshold = bind(reinterpret(word, "float32", 1))
        for e in range(steps):
            put(passing, 0, T.Select(scores[e] > threshold, passing[0], T.int32(0)))
            put(depth, 0, depth[0] + passing[0])
        put(depth, 0, T.min(depth[0], bind(of["state"][DEEPEST])))
        bits = registers(1)
        put(bits, 0, const(shape.profile.depth_bits[0], "float32"))
        for e in range(1, shape.profile.depths):
            put(bits, 0, T.Select(depth[0] > e, const(shape.profile.depth_bits[e], "float32"), bits[0]))
        put(of["routing"], 2 * place, depth[0])
        used = bind(of["routing"][2 * token + 1])
        total = bind(reinterpret(used, "float32", 1) + parameters[0] * bits[0])
        put(of["routing"], 2 * token + 1, reinterpret(total, "int32", 1))


def norm(
    name: str, k: int, eps: float, threads: int, tokens: int, *, branch: bool, router: RouterShape | None,
    last: bool = False, normed: bool = True,
) -> Kernel:  # fmt: skip
    """Adds ``branch`` to the residual stream, takes the RMS norm, and routes by the input of the norm.

    Buffers: residual float32 [tokens, k], in place; branch float32 [tokens, k]; weight float32 [k]; y float32
    [tokens, k], the result.

    Args:
        name: the kernel's name.
        k: hidden size.
        eps: added to the mean square.
        threads: work-items for each token.
        tokens: rows of the residual stream.
        branch: whether there is a branch to add.
        router: the router behind the norm, or None.
        last: compute only the row that ``state`` names, and write its norm and depth to row 0.
        normed: False writes the sum to y as it is; there is no weight then.
    """
    buffers = {"residual": ("float32", tokens * k)}
    if branch:
        buffers["branch"] = ("float32", tokens * k)
    if normed:
        buffers["weight"] = ("float32", k)
    buffers["y"] = ("float32", tokens * k)
    if router:
        buffers |= _router_buffers(router, k, tokens)
    grid = (1 if last else tokens, 1)

    def body() -> None:
        with frame(name, buffers, grid, threads) as (*arguments, item):
            of = dict(zip(buffers, arguments, strict=True))
            token = bind(of["state"][ROW]) if last else item.x
            place = T.int32(0) if last else item.x

            def visit(column: Expr) -> Expr:
                at = bind(token * k + column)
                if not branch:
                    return of["residual"][at]
                v = bind(of["residual"][at] + of["branch"][at])
                # The last norm runs once for each wanted row, so it must not change the residual stream.
                if not last:
                    put(of["residual"], at, v)
                return v

            sums = _sums(item, threads, k, router, of, visit)
            if normed:
                mean = sums[0] * const(1 / k, "float32") + const(eps, "float32")
                inverse = bind(const(1, "float32") / T.sqrt(mean))
            with strided(item, k, threads) as column:
                at = bind(token * k + column)
                v = of["residual"][at] + of["branch"][at] if branch and last else of["residual"][at]
                put(of["y"], place * k + column, v * inverse * of["weight"][column] if normed else v)
            if router:
                _decide(item, k, router, of, sums, token, place)

    return Kernel(name, grid, threads, body)


def plain_norm(name: str, k: int, eps: float, threads: int, tokens: int) -> Kernel:
    """RMS norm in place: x float32 [tokens, k], weight float32 [k].

    Args:
        name: the kernel's name.
        k: hidden size.
        eps: added to the mean square.
        threads: work-items for each token.
        tokens: rows of x.
    """
    buffers = {"x": ("float32", tokens * k), "weight": ("float32", k)}

    def body() -> None:
        with frame(name, buffers, (tokens, 1), threads) as (x, weight, item):
            sums = _sums(item, threads, k, None, {}, lambda column: x[item.x * k + column])
            inverse = bind(const(1, "float32") / T.sqrt(sums[0] * const(1 / k, "float32") + const(eps, "float32")))
            with strided(item, k, threads) as column:
                at = bind(item.x * k + column)
                put(x, at, x[at] * inverse * weight[column])

    return Kernel(name, (tokens, 1), threads, body)


def _silu(x: Expr) -> Expr:
    return x / (const(1, "float32") + T.exp(const(0, "float32") - x))


def _gelu_tanh(x: Expr) -> Expr:
    # 0.5 * (1 + tanh(u)) = 1 / (1 + exp(-2 u)). The tanh of some drivers overflows.
    u = const(2 * 0.7978845608028654, "float32") * (x + const(0.044715, "float32") * x * x * x)
    return x / (const(1, "float32") + T.exp(const(0, "float32") - u))


ACTIVATIONS = {"silu": _silu, "gelu_tanh": _gelu_tanh}


def gate(name: str, k: int, threads: int, tokens: int, *, activation: str, router: RouterShape) -> Kernel:
    """stacked float32 [tokens, 2 k], gate then up -> y float32 [tokens, k] = activation(gate) * up. Routes by y.

    Args:
        name: the kernel's name.
        k: width of the MLP.
        threads: work-items for each token.
        tokens: rows.
        activation: a key of ``ACTIVATIONS``.
        router: the router of the next matrix.
    """
    buffers = {"stacked": ("float32", tokens * 2 * k), "y": ("float32", tokens * k)}
    buffers |= _router_buffers(router, k, tokens)

    def body() -> None:
        with frame(name, buffers, (tokens, 1), threads) as (*arguments, item):
            of = dict(zip(buffers, arguments, strict=True))

            def visit(column: Expr) -> Expr:
                at = bind(item.x * (2 * k) + column)
                v = bind(ACTIVATIONS[activation](bind(of["stacked"][at])) * of["stacked"][at + k])
                put(of["y"], item.x * k + column, v)
                return v

            sums = _sums(item, threads, k, router, of, visit)
            _decide(item, k, router, of, sums, item.x, item.x)

    return Kernel(name, (tokens, 1), threads, body)


def route(name: str, k: int, threads: int, tokens: int, router: RouterShape) -> Kernel:
    """Routes by x float32 [tokens, k].

    Args:
        name: the kernel's name.
        k: width of x.
        threads: work-items for each token.
        tokens: rows.
        router: the router.
    """
    buffers = {"x": ("float32", tokens * k), **_router_buffers(router, k, tokens)}

    def body() -> None:
        with frame(name, buffers, (tokens, 1), threads) as (*arguments, item):
            of = dict(zip(buffers, arguments, strict=True))
            sums = _sums(item, threads, k, router, of, lambda column: of["x"][item.x * k + column])
            _decide(item, k, router, of, sums, item.x, item.x)

    return Kernel(name, (tokens, 1), threads, body)


def order(name: str, tokens: int) -> Kernel:
    """routing -> order int32 [tokens]: the tokens of the pass, sorted by depth (stable). Unused places come last.

    Args:
        name: the kernel's name.
        tokens: the most tokens of a pass.
    """
    buffers = {"routing": ("int32", 2 * tokens), "state": ("int32", TOKENS + tokens), "order": ("int32", tokens)}

    def body() -> None:
        with frame(name, buffers, (1, 1), tokens) as (routing, state, order, item):
            count = bind(state[COUNT])
            depths, place = shared(tokens, "int32"), registers(1, "int32")
            put(depths, item.thread, T.Select(item.thread < count, routing[2 * item.thread], T.int32(99)))
            barrier()
            put(place, 0, T.int32(0))
            mine = bind(depths[item.thread])
            with T.serial(0, tokens) as other:
                theirs = bind(depths[other])
                before = T.Or(theirs < mine, T.And(theirs == mine, other < item.thread))
                put(place, 0, place[0] + T.Select(before, T.int32(1), T.int32(0)))
            put(order, place[0], item.thread)

    return Kernel(name, (1, 1), tokens, body)
