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
    width, half = shape.head_dim, shape.rotated // 2
    whole = norm is not None and norm.rows
    buffers = {"qkv": ("float32", tokens * shape.all * width)}
    if half:
        buffers["rotary"] = ("float32", ANY_SIZE)
    if norm is not None:
        buffers["norms"] = ("float32", (shape.heads + shape.kv_heads if whole else 2) * width)
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
            factor: Expr = None

            def gain(i: Expr, part: int) -> Expr:
                return of["norms"][(head if whole else part) * width + i]

            def value(i: Expr, part: int) -> Expr:
                v = of["qkv"][start + i]
                normed = norm is not None and not norm.last
                return bind(v * factor * gain(i, part) if normed else v)

            def rotated(i: Expr, part: int) -> Any:
                """Number i of a head of q (part 0) or k (part 1), in a register."""
                result = registers(1)
                put(result, 0, value(i, part))
                if half:
                    with when(i < shape.rotated):
                        first = bind(T.Select(i < half, i, i - half))
                        cos = bind(of["rotary"][position * shape.rotated + first])
                        sin = bind(of["rotary"][position * shape.rotated + half + first])
                        other = value(bind(T.Select(i < half, i + half, i - half)), part)
                        signed = T.Select(i < half, const(0, "float32") - other, other)
                        put(result, 0, result[0] * cos + signed * sin)
                return result

            if norm is not None:
                partial = registers(1)
                put(partial, 0, const(0, "float32"))
                if whole:
                    bounds = registers(2, "int32")
                    of_q = bind(head < shape.heads)
                    first_head = T.Select(of_q, T.int32(0), T.int32(shape.heads))
                    put(bounds, 0, (token * shape.all + first_head) * width)
                    put(bounds, 1, T.Select(of_q, T.int32(shape.heads * width), T.int32(shape.kv_heads * width)))
                    row, count = bind(bounds[0]), bind(bounds[1])
                    with strided(item, count, threads) as i:
                        v = bind(of["qkv"][row + i])
                        put(partial, 0, partial[0] + v * v)
                    share = bind(const(1, "float32") / cast(count, "float32", 1))
                else:
                    with strided(item, width, threads) as i:
                        v = bind(rotated(i, 0)[0] if norm.last else of["qkv"][start + i])
                        put(partial, 0, partial[0] + v * v)
                    share = const(1 / width, "float32")
                sums = reduce_sums(item, threads, [partial[0]])
                mean = sums[0] * share + const(norm.eps, "float32")
                factor = bind(const(1, "float32") / T.sqrt(mean))

            def turned(i: Expr, part: int) -> None:
                """Write number i of a head of q (part 0) or k (part 1)."""
                result = rotated(i, part)
                if norm is not None and norm.last:
                    put(result, 0, result[0] * factor * gain(i, part))
                if part == 0 and grows:
                    put(result, 0, result[0] * of["growth"][position])
                if part == 0:
                    put(of["q"], (token * shape.heads + head) * width + i, result[0])
                else:
                    put(of["keys"], (position * shape.kv_heads + head - shape.heads) * width + i, result[0])

            # The cache may have no room behind the last token of the pass.
            with when(token < of["state"][COUNT]), strided(item, width, threads) as i:
                with when(head < shape.heads):
                    turned(i, 0)
                with when(T.And(head >= shape.heads, head < shape.heads + shape.kv_heads)):
                    turned(i, 1)
                with when(head >= shape.heads + shape.kv_heads):
                    kv = head - shape.heads - shape.kv_heads
                    put(of["values"], (position * shape.kv_heads + kv) * width + i, of["qkv"][start + i])

    return Kernel(name, grid, threads, body)


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
                    total = registers(1, "float32x4")
                    put(total, 0, const(0, "float32", 4))
                    with T.serial(0, quads) as i:
                        put(total, 0, total[0] + query[i] * keys[(mine * shape.kv_heads + kv) * quads + i])
                    t = bind(total[0])
                    dot = element(t, 0, 4) + element(t, 1, 4) + element(t, 2, 4) + element(t, 3, 4)
                    put(score, 0, dot * const(scale, "float32"))
                    if cap is not None:
                        put(score, 0, soft_cap(score[0], cap))
                put(scores, item.thread, score[0])
                barrier()
                peak = registers(1)
                put(peak, 0, running[0])
                with T.serial(0, threads) as i:
                    put(peak, 0, T.max(peak[0], scores[i]))
                put(shares, item.thread, T.Select(mine <= last, T.exp(score[0] - peak[0]), const(0, "float32")))
                shrink = bind(T.exp(running[0] - peak[0]))
                put(running, 0, peak[0])
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
