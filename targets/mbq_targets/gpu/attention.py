"""Rotation of queries and keys, the cache of keys and values, and attention over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from ..kernels.emit import Expr, bind, cast, const
from .kernel import (
    ANY_SIZE,
    COUNT,
    POSITION,
    TOKENS,
    Item,
    Kernel,
    barrier,
    element,
    frame,
    put,
    reduce_sums,
    registers,
    shared,
    strided,
    when,
)

_LOWEST = -3e38


def soft_cap(x: Expr, cap: float) -> Expr:
    """``cap * tanh(x / cap)``. The tanh of some drivers overflows, so it is made of an exponential.

    Args:
        x: float32.
        cap: the largest value that is reached.
    """
    u = bind(T.exp(const(-2 / cap, "float32") * T.max(x, const(-20 * cap, "float32"))))
    return bind(const(cap, "float32") * ((const(1, "float32") - u) / (const(1, "float32") + u)))


@dataclass(frozen=True)
class HeadNorm:
    """An RMS norm of q and of k.

    eps: added to the mean square.
    rows: the norm is over all heads of q together, and of k. False: the same norm over each head.
    last: the norm comes behind the rotation, not before it.
    """

    eps: float
    rows: bool = False
    last: bool = False


@dataclass(frozen=True)
class Heads:
    """The heads of an attention.

    heads: query heads.
    kv_heads: heads of keys and of values.
    head_dim: width of a head.
    rotated: how many of the first numbers of a head are rotated.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotated: int

    @property
    def all(self) -> int:
        """Heads of queries, keys and values together."""
        return self.heads + 2 * self.kv_heads


def rotate(
    name: str, shape: Heads, tokens: int, threads: int, *, norm: HeadNorm | None = None, grows: bool = False
) -> Kernel:
    """Rotates queries and keys. Writes keys and values to their caches at the positions of the pass.

    Buffers: qkv float32 [tokens, heads + 2 kv_heads, head_dim]; rotary float32 [context, 2, rotated / 2], cos and sin,
    absent where nothing is rotated; norms float32 [2, head_dim], or [heads + kv_heads, head_dim] of whole rows; growth
    float32 [context], which queries are multiplied by; q float32 [tokens, heads, head_dim]; keys and values float32
    [context, kv_heads, head_dim].

    Args:
        name: the kernel's name.
        shape: the heads.
        tokens: rows.
        threads: work-items for each head of a token.
        norm: of q and k. None: no norm.
        grows: whether there is the buffer growth.
    """
    width = shape.head_dim
    buffers = {"qkv": ("float32", tokens * shape.all * width)}
    if shape.rotated:
        buffers["rotary"] = ("float32", ANY_SIZE)
    if norm is not None:
        buffers["norms"] = ("float32", (shape.heads + shape.kv_heads if norm.rows else 2) * width)
    if grows:
        buffers["growth"] = ("float32", ANY_SIZE)
    buffers |= {
        "state": ("int32", TOKENS + tokens),
        "q": ("float32", tokens * shape.heads * width),
        "keys": ("float32", ANY_SIZE),
        "values": ("float32", ANY_SIZE),
    }
    grid = (shape.all, tokens)

    def body() -> None:
        with frame(name, buffers, grid, threads) as (*arguments, item):
            of = dict(zip(buffers, arguments, strict=True))
            head, token = item.x, item.y
            position = bind(of["state"][POSITION] + token)
            start = bind((token * shape.all + head) * width)
            one = _Head(shape, norm, of, item, threads, position, start)
            factor = None if norm is None else one.norm_factor(norm)
            # The cache may have no room behind the last token of the pass.
            with when(token < of["state"][COUNT]), strided(item, width, threads) as i:
                with when(head < shape.heads):
                    one.write_query(i, factor)
                with when(T.And(head >= shape.heads, head < shape.heads + shape.kv_heads)):
                    one.write_key(i, factor)
                with when(head >= shape.heads + shape.kv_heads):
                    kv = head - shape.heads - shape.kv_heads
                    put(of["values"], (position * shape.kv_heads + kv) * width + i, of["qkv"][start + i])

    return Kernel(name, grid, threads, body)


@dataclass(frozen=True)
class _Head:
    """One head of a token, which a work-group turns. Its methods write the statements.

    shape, norm, threads: of ``rotate``.
    of: its buffers by name.
    position: of the token. start: of the head in qkv.

    In the methods, i is a number of the head, part is 0 for a head of q and 1 for one of k, and factor is what the norm
    multiplies by besides its weights (None: no norm).
    """

    shape: Heads
    norm: HeadNorm | None
    of: dict[str, Any]
    item: Item
    threads: int
    position: Expr
    start: Expr

    def write_query(self, i: Expr, factor: Expr) -> None:
        """Write number i of a head of q."""
        result = self._turned(i, 0, factor)
        if "growth" in self.of:
            put(result, 0, result[0] * self.of["growth"][self.position])
        put(self.of["q"], (self.item.y * self.shape.heads + self.item.x) * self.shape.head_dim + i, result[0])

    def write_key(self, i: Expr, factor: Expr) -> None:
        """Write number i of a head of k."""
        result = self._turned(i, 1, factor)
        row = self.position * self.shape.kv_heads + self.item.x - self.shape.heads
        put(self.of["keys"], row * self.shape.head_dim + i, result[0])

    def norm_factor(self, norm: HeadNorm) -> Expr:
        """The inverse of the root mean square."""
        shape, of, item = self.shape, self.of, self.item
        width = shape.head_dim
        partial = registers(1)
        put(partial, 0, const(0, "float32"))
        if norm.rows:
            bounds = registers(2, "int32")
            of_q = bind(item.x < shape.heads)
            first_head = T.Select(of_q, T.int32(0), T.int32(shape.heads))
            put(bounds, 0, (item.y * shape.all + first_head) * width)
            put(bounds, 1, T.Select(of_q, T.int32(shape.heads * width), T.int32(shape.kv_heads * width)))
            row, count = bind(bounds[0]), bind(bounds[1])
            with strided(item, count, self.threads) as i:
                v = bind(of["qkv"][row + i])
                put(partial, 0, partial[0] + v * v)
            share = bind(const(1, "float32") / cast(count, "float32", 1))
        else:
            with strided(item, width, self.threads) as i:
                v = bind(self._rotated(i, 0, None)[0] if norm.last else of["qkv"][self.start + i])
                put(partial, 0, partial[0] + v * v)
            share = const(1 / width, "float32")
        sums = reduce_sums(item, self.threads, [partial[0]])
        mean = sums[0] * share + const(norm.eps, "float32")
        return bind(const(1, "float32") / T.sqrt(mean))

    def _turned(self, i: Expr, part: int, factor: Expr) -> Any:
        """Number i after the norm and the rotation, in a register."""
        result = self._rotated(i, part, factor)
        if self.norm is not None and self.norm.last:
            put(result, 0, result[0] * factor * self._gain(self.norm, i, part))
        return result

    def _rotated(self, i: Expr, part: int, factor: Expr) -> Any:
        """Number i after the rotation, and after a norm before it, in a register."""
        half, table = self.shape.rotated // 2, self.position * self.shape.rotated
        result = registers(1)
        put(result, 0, self._value(i, part, factor))
        if half:
            with when(i < self.shape.rotated):
                first = bind(T.Select(i < half, i, i - half))
                cos = bind(self.of["rotary"][table + first])
                sin = bind(self.of["rotary"][table + half + first])
                other = self._value(bind(T.Select(i < half, i + half, i - half)), part, factor)
                signed = T.Select(i < half, const(0, "float32") - other, other)
                put(result, 0, result[0] * cos + signed * sin)
        return result

    def _value(self, i: Expr, part: int, factor: Expr) -> Expr:
        """Number i of qkv, after a norm before the rotation."""
        v, norm = self.of["qkv"][self.start + i], self.norm
        return bind(v if norm is None or norm.last else v * factor * self._gain(norm, i, part))

    def _gain(self, norm: HeadNorm, i: Expr, part: int) -> Expr:
        """The weight of the norm for number i."""
        return self.of["norms"][(self.item.x if norm.rows else part) * self.shape.head_dim + i]


def attend(
    name: str, shape: Heads, tokens: int, threads: int, *, scale: float, window: int | None, cap: float | None = None
) -> Kernel:
    """q float32 [tokens, heads, head_dim], keys and values float32 [context, kv_heads, head_dim] -> y as q.

    A work-group handles one head of one token. It reads the cache ``threads`` positions at a time and keeps a running
    maximum. A work-item first computes the score of a position, then columns of the result.

    Args:
        name: the kernel's name.
        shape: the heads.
        tokens: rows.
        threads: positions at a time, and work-items of a work-group.
        scale: factor of q . k.
        window: positions that a token sees, itself included. None: all.
        cap: soft cap of the scores. None: none.
    """
    width, quads = shape.head_dim, shape.head_dim // 4
    per_item = -(-width // threads)
    buffers = {
        "q": ("float32x4", tokens * shape.heads * quads),
        "keys": ("float32x4", ANY_SIZE // 4),
        "values": ("float32", ANY_SIZE),
        "state": ("int32", TOKENS + tokens),
        "y": ("float32", tokens * shape.heads * width),
    }
    grid = (shape.heads, tokens)
    kv_of = shape.heads // shape.kv_heads

    def body() -> None:
        with frame(name, buffers, grid, threads) as (q, keys, values, state, y, item):
            head, token = item.x, item.y
            kv = bind(head // kv_of)
            valid = bind(token < state[COUNT])
            last = bind(state[POSITION] + token)
            begin = registers(1, "int32")
            put(begin, 0, T.int32(0))
            if window is not None:
                put(begin, 0, T.Select(last >= window, last - (window - 1), T.int32(0)))
            first = bind(begin[0])
            query, scores, shares = shared(quads, "float32x4"), shared(threads), shared(threads)
            with strided(item, quads, threads) as i:
                put(query, i, q[(token * shape.heads + head) * quads + i])
            running = registers(2)  # the maximum, and the sum of exponentials
            put(running, 0, const(_LOWEST, "float32"))
            put(running, 1, const(0, "float32"))
            result = registers(per_item)
            for c in range(per_item):
                put(result, c, const(0, "float32"))
            barrier()
            seen = bind(T.Select(valid, last - first + 1, T.int32(0)))
            with T.serial(0, (seen + (threads - 1)) // threads) as tile:
                at = bind(first + tile * threads)
                mine = bind(at + item.thread)
                score = registers(1)
                put(score, 0, const(_LOWEST, "float32"))
                with when(mine <= last):
                    dot = _dot(query, keys, (mine * shape.kv_heads + kv) * quads, quads)
                    put(score, 0, dot * const(scale, "float32"))
                    if cap is not None:
                        put(score, 0, soft_cap(score[0], cap))
                put(scores, item.thread, score[0])
                barrier()
                peak = _largest(scores, threads, running[0])
                put(shares, item.thread, T.Select(mine <= last, T.exp(score[0] - peak), const(0, "float32")))
                shrink = bind(T.exp(running[0] - peak))
                put(running, 0, peak)
                put(running, 1, running[1] * shrink)
                barrier()
                for c in range(per_item):
                    put(result, c, result[c] * shrink)
                with T.serial(0, threads) as i:
                    share = bind(shares[i])
                    put(running, 1, running[1] + share)
                    # Behind the last position the cache may hold NaN, and 0 times NaN is NaN.
                    row = bind(T.Select(at + i <= last, at + i, last) * shape.kv_heads + kv)
                    for c in range(per_item):
                        column = bind(item.thread + c * threads)
                        with when(column < width):
                            put(result, c, result[c] + share * values[row * width + column])
                barrier()
            for c in range(per_item):
                column = bind(item.thread + c * threads)
                with when(T.And(column < width, valid)):
                    put(y, (token * shape.heads + head) * width + column, result[c] / running[1])

    return Kernel(name, grid, threads, body)


def _dot(query: Any, keys: Any, row: Expr, quads: int) -> Expr:
    """The product of the query and the key that begins at ``keys[row]``, both of vectors of four numbers."""
    total = registers(1, "float32x4")
    put(total, 0, const(0, "float32", 4))
    with T.serial(0, quads) as i:
        put(total, 0, total[0] + query[i] * keys[row + i])
    t = bind(total[0])
    return element(t, 0, 4) + element(t, 1, 4) + element(t, 2, 4) + element(t, 3, 4)


def _largest(scores: Any, count: int, floor: Expr) -> Expr:
    """The largest of the scores and of ``floor``."""
    peak = registers(1)
    put(peak, 0, floor)
    with T.serial(0, count) as i:
        put(peak, 0, T.max(peak[0], scores[i]))
    return peak[0]
