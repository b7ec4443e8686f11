"""What the GPU kernels share: their frame, reductions over a work-group, and float16 in 32-bit words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from ..kernels.emit import Expr, bind, cast, const, reinterpret, splat

POSITION, COUNT, ROW, DEEPEST, THRESHOLDS, TOKENS = 0, 1, 2, 3, 4, 8
"""Words of the buffer ``state``, int32.

POSITION: tokens in the cache before this pass. COUNT: tokens of this pass. ROW: the token whose logits are wanted.
DEEPEST: the most that a depth may be. From THRESHOLDS on: the threshold of each table, as the bits of a float32. From
TOKENS on: the ids of the tokens.

The buffer ``routing`` is int32 [tokens, 2]: the depth that the last router gave a token, and the bits that the token
has used so far, weighted by the share of each matrix, as the bits of a float32."""

MAX_TABLES = TOKENS - THRESHOLDS
"""The most tables of thresholds of a model."""

ANY_SIZE = 1 << 30
"""Elements of a buffer whose length is known only on the device."""


@dataclass(frozen=True)
class Kernel:
    """One kernel before it is lowered.

    name: its function, without the suffix ``_kernel``.
    grid: work-groups (x, y).
    threads: work-items in each work-group.
    """

    name: str
    grid: tuple[int, int]
    threads: int
    body: Any = field(compare=False)
    """A function that builds the TIR function ``name`` inside an open builder."""


@dataclass(frozen=True)
class Item:
    """The place of a work-item.

    x: work-group along x.
    y: work-group along y.
    thread: number of the work-item in its work-group.
    """

    x: Expr
    y: Expr
    thread: Expr


@contextmanager
def frame(name: str, buffers: dict[str, tuple[str, int]], grid: tuple[int, int], threads: int) -> Iterator[Any]:
    """Open a device function. Yields its buffers, then the ``Item``.

    Args:
        name: the function's name.
        buffers: {name: (element type, elements)}.
        grid: work-groups (x, y).
        threads: work-items in each.
    """
    with T.prim_func():
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        arguments = [T.arg(arg, T.buffer((size,), base)) for arg, (base, size) in buffers.items()]
        with (
            T.launch_thread("blockIdx.x", grid[0]) as x,
            T.launch_thread("blockIdx.y", grid[1]) as y,
            T.launch_thread("threadIdx.x", threads) as thread,
        ):
            yield (*arguments, Item(x, y, thread))


def registers(size: int, base: str = "float32") -> Any:
    """Memory of a work-item. It is in registers if all indices are constants.

    Args:
        size: elements.
        base: element type.
    """
    return T.alloc_buffer((size,), base, scope="local")


def shared(size: int, base: str = "float32") -> Any:
    """Memory of a work-group.

    Args:
        size: elements.
        base: element type.
    """
    return T.alloc_buffer((size,), base, scope="shared")


def barrier() -> None:
    """Wait until all work-items of the group are here."""
    T.evaluate(T.tvm_storage_sync("shared"))


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    """``if condition:``

    Args:
        condition: a boolean expression.
    """
    with T.If(condition), T.Then():
        yield


@contextmanager
def strided(item: Item, size: int | Expr, threads: int) -> Iterator[Expr]:
    """``for i in range(thread, size, threads)``. Yields i.

    Args:
        item: the work-item.
        size: where the range ends.
        threads: work-items of the group.
    """
    with T.serial(0, (size + (threads - 1)) // threads) as step:
        index = bind(step * threads + item.thread)
        if not isinstance(size, int) or size % threads:
            with when(index < size):
                yield index
        else:
            yield index


def reduce_sums(item: Item, threads: int, partial: list[Expr]) -> Any:
    """Sums over the work-group: memory of the group, float32 [len(partial)].

    Args:
        item: the work-item.
        threads: work-items of the group.
        partial: float32 sums of the work-item.
    """
    count = len(partial)
    parts, sums = shared(count * threads), shared(count)
    for i in range(count):
        put(parts, i * threads + item.thread, partial[i])
    barrier()
    with strided(item, count, threads) as i:
        total = registers(1)
        put(total, 0, const(0, "float32"))
        with T.serial(0, threads) as j:
            put(total, 0, total[0] + parts[i * threads + j])
        put(sums, i, total[0])
    barrier()
    return sums


def half_to_float(bits: Expr, lanes: int = 1) -> Expr:
    """float32 of the float16 in the low 16 bits of uint32 words. It is exact and needs no half type on the device.

    It uses arithmetic instead of a selection, so it works on vectors. Infinities and NaN become finite numbers; no
    bundle contains them.

    Args:
        bits: uint32 words.
        lanes: words.
    """

    def word(value: int) -> Expr:
        return const(value, "uint32", lanes)

    def number(value: float) -> Expr:
        return const(value, "float32", lanes)

    exponent = bind((bits >> word(10)) & word(31))
    mantissa = bind(bits & word(1023))
    # 112: the exponent bias of float32 minus that of float16.
    normal = bind(((exponent + word(112)) << word(23)) | (mantissa << word(13)))
    is_normal = bind(cast((exponent + word(31)) >> word(5), "float32", lanes))
    # A product converts subnormal numbers. Shifted bits would be small float32 numbers, which devices may clear.
    subnormal = cast(mantissa, "float32", lanes) * number(2.0**-24) * (number(1) - is_normal)
    sign = number(1) - number(2) * cast((bits >> word(15)) & word(1), "float32", lanes)
    return bind((bind(reinterpret(normal, "float32", lanes)) * is_normal + subnormal) * sign)


def element(value: Expr, index: int, lanes: int) -> Expr:
    """One element of a vector.

    Args:
        value: an expression of ``lanes`` elements.
        index: which.
        lanes: 1 for a scalar.
    """
    return value if lanes == 1 else T.Shuffle([value], [index])


def spread(value: Expr, lanes: int) -> Expr:
    """A vector with the same value in each lane.

    Args:
        value: a scalar expression.
        lanes: elements of the result.
    """
    return value if lanes == 1 else splat(value, lanes)


def module(kernels: list[Kernel]) -> Any:
    """IRModule of the kernels.

    Args:
        kernels: kernels with different names.
    """
    from tvm.script.ir_builder import ir as I

    with IRBuilder() as builder, I.ir_module():
        for kernel in kernels:
            kernel.body()
    return builder.get()


def put(buffer: Any, index: Expr, value: Expr) -> None:
    """``buffer[index] = value``

    Args:
        buffer: any buffer.
        index: the element.
        value: an expression of the buffer's element type.
    """
    T.buffer_store(buffer, value, [index])
