"""From the last norm to a token: the rotation of the head's input, and the largest logit."""

from __future__ import annotations

from tvm.tirx.script import builder as T

from ..kernels.emit import bind, const
from .attention import soft_cap
from .kernel import ROW, TOKENS, Kernel, barrier, frame, put, registers, shared, strided, when

_LOWEST = -3e38


def turn(name: str, a: int, b: int, side: str, threads: int, *, gain: bool = False) -> Kernel:
    """x float32 [a, b] -> y float32 [a, b] = factor @ x or x @ factor.

    Args:
        name: the kernel's name.
        a: rows.
        b: columns.
        side: "left" for factor float32 [a, a], "right" for factor float32 [b, b].
        threads: work-items of a work-group.
        gain: multiply the result by gain float32 [a, b].
    """
    inner = a if side == "left" else b
    buffers = {"x": ("float32", a * b), "factor": ("float32", inner * inner)}
    if gain:
        buffers["gain"] = ("float32", a * b)
    buffers["y"] = ("float32", a * b)
    grid = (-(-a * b // threads), 1)

    def body() -> None:
        with frame(name, buffers, grid, threads) as (*arguments, item):
            of = dict(zip(buffers, arguments, strict=True))
            at = bind(item.x * threads + item.thread)
            with when(at < a * b):
                row, column = bind(at // b), bind(at % b)
                total = registers(1)
                put(total, 0, const(0, "float32"))
                with T.serial(0, inner) as i:
                    x, f = (i * b + column, row * a + i) if side == "left" else (row * b + i, i * b + column)
                    put(total, 0, total[0] + of["x"][x] * of["factor"][f])
                put(of["y"], at, total[0] * of["gain"][at] if gain else total[0])

    return Kernel(name, grid, threads, body)


def cap(name: str, n: int, threads: int, limit: float) -> Kernel:
    """logits float32 [n] -> their soft cap, in place.

    Args:
        name: the kernel's name.
        n: logits.
        threads: work-items of a work-group.
        limit: the largest value that is reached.
    """
    grid = (-(-n // threads), 1)

    def body() -> None:
        with frame(name, {"logits": ("float32", n)}, grid, threads) as (logits, item):
            at = bind(item.x * threads + item.thread)
            with when(at < n):
                put(logits, at, soft_cap(bind(logits[at]), limit))

    return Kernel(name, grid, threads, body)


def argmax(name: str, n: int, threads: int, chunk: int) -> Kernel:
    """logits float32 [n] -> result int32 [2]: the first largest logit, and the used bits of the row in ``state``.

    Args:
        name: the kernel's name.
        n: logits.
        threads: work-items.
        chunk: the most tokens of a pass.
    """
    buffers = {
        "logits": ("float32", n),
        "routing": ("int32", 2 * chunk),
        "state": ("int32", TOKENS + chunk),
        "result": ("int32", 2),
    }

    def body() -> None:
        with frame(name, buffers, (1, 1), threads) as (logits, routing, state, result, item):
            value, index = registers(1), registers(1, "int32")
            values, indices = shared(threads), shared(threads, "int32")
            put(value, 0, const(_LOWEST, "float32"))
            put(index, 0, T.int32(0))
            with strided(item, n, threads) as i:
                v = bind(logits[i])
                with when(v > value[0]):
                    put(value, 0, v)
                    put(index, 0, i)
            put(values, item.thread, value[0])
            put(indices, item.thread, index[0])
            barrier()
            with when(item.thread == 0):
                with T.serial(0, threads) as i:
                    v, at = bind(values[i]), bind(indices[i])
                    with when(T.Or(v > value[0], T.And(v == value[0], at < index[0]))):
                        put(value, 0, v)
                        put(index, 0, at)
                put(result, 0, index[0])
                put(result, 1, routing[2 * state[ROW] + 1])

    return Kernel(name, (1, 1), threads, body)
