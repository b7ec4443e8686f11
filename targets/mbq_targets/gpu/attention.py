"""Rotation of queries and keys, the cache of keys and values, and attention over it."""

from __future__ import annotations

from dataclasses import dataclass

from tvm.tirx.script import builder as T

from ..kernels.emit import Expr, bind, const
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


def rotate(name: str, shape: Heads, tokens: int, threads: int, norm_eps: float | None = None) -> Kernel:
    """Rotates queries and keys. Writes keys and values to their caches at the positions of the pass.

    Buffers: qkv float32 [tokens, heads + 2 kv_heads, head_dim]; rotary float32 [context, 2, rotated / 2], cos and sin;
    norms float32 [2, head_dim]; q float32 [tokens, heads, head_dim]; keys and values float32
    [context, kv_heads, head_dim].

    Args:
        name: the kernel's name.
        shape: the heads.
        tokens: rows.
        threads: work-items for each head of a token.
        norm_eps: added to the mean square in an RMS norm over each head of q and k before the rotation. None: no norm.
    """
    width, half = shape.head_dim, shape.rotated // 2
    buffers = {"qkv": ("float32", tokens * shape.all * width), "rotary": ("float32", ANY_SIZE)}
    if norm_eps is not None:
        buffers["norms"] = ("float32", 2 * width)
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
            if norm_eps is not None:
                partial = registers(1)
                put(partial, 0, const(0, "float32"))
                with strided(item, width, threads) as i:
                    v = bind(of["qkv"][start + i])
                    put(partial, 0, partial[0] + v * v)
                sums = reduce_sums(item, threads, [partial[0]])
                mean = sums[0] * const(1 / width, "float32") + const(norm_eps, "float32")
                factor = bind(const(1, "float32") / T.sqrt(mean))

            def value(i: Expr, part: int) -> Expr:
                v = of["qkv"][start + i]
                return bind(v if factor is None else v * factor * of["norms"][part * width + i])

            def turned(i: Expr, part: int) -> None:
                """Write number i of a head of q (part 0) or k (part 1)."""
                result = registers(1)
                put(result, 0, value(i, part))
                with when(i < shape.rotated):
                    first = bind(T.Select(i < half, i, i - half))
                    cos = bind(of["rotary"][position * shape.rotated + first])
                    sin = bind(of["rotary"][position * shape.rotated + half + first])
                    other = value(bind(T.Select(i < half, i + half, i - half)), part)
                    signed = T.Select(i < half, const(0, "float32") - other, other)
                    put(result, 0, result[0] * cos + signed * sin)
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


def attend(name: str, shape: Heads, tokens: int, threads: int, *, scale: float, window: int | None) -> Kernel:
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
