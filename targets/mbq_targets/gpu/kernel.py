"""What the device kernels share: their frame, reductions over a work-group, and float16 in 32-bit words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from ..kernels.emit import Expr, bind, cast, const, reinterpret, splat

# Words of the state buffer.
POSITION, COUNT, ROW, THRESHOLDS, TOKENS = 0, 1, 2, 4, 8
"""position: tokens in the cache before this pass; count: tokens of this pass; row: the one whose logits are
wanted; then the threshold of each table (the bits of a float32) and the ids of the pass's tokens.

The buffer ``routing``, int32 [tokens, 2], goes with it: the depth the last router gave a token, and the bits
all of them so far made it use, weighted by share (the bits of a float32)."""

MAX_TABLES = TOKENS - THRESHOLDS

ANY_SIZE = 1 << 30  # elements of a buffer whose length is known only on the device


@dataclass(frozen=True)
class Kernel:
    """One kernel before it is lowered.  grid: work-groups; threads: items in each."""

    name: str
    grid: tuple[int, int]
    threads: int
    body: Any = field(compare=False)
    """A function that builds the TIR function ``name`` inside an open builder."""


@dataclass(frozen=True)
class Item:
    """Where a work-item stands: work-group (x, y), and its number in the group."""

    x: Expr
    y: Expr
    thread: Expr


@contextmanager
def frame(name: str, buffers: dict[str, tuple[str, int]], grid: tuple[int, int], threads: int) -> Iterator[Any]:
    """A device function over ``buffers`` {name: (element type, elements)}; yields the buffers, then the item."""
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
    """Memory of the item; its index must be a constant for it to be registers."""
    return T.alloc_buffer((size,), base, scope="local")


def shared(size: int, base: str = "float32") -> Any:
    """Memory of the work-group."""
    return T.alloc_buffer((size,), base, scope="shared")


def barrier() -> None:
    T.evaluate(T.tvm_storage_sync("shared"))


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    with T.If(condition), T.Then():
        yield


@contextmanager
def strided(item: Item, size: int, threads: int) -> Iterator[Expr]:
    """``for i in range(thread, size, threads)``"""
    with T.serial(0, -(-size // threads)) as step:
        index = bind(step * threads + item.thread)
        if size % threads:
            with when(index < size):
                yield index
        else:
            yield index


def reduce_sums(item: Item, threads: int, partial: list[Expr]) -> Any:
    """Partial sums of each item -> their sums over the work-group, shared [len(partial)]."""
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
    """float32 of the float16 in the low 16 bits of uint32 words, exact, with no half type on the device.

    Arithmetic in place of a choice, so that it is the same for vectors; infinities and NaN, which no
    bundle holds, come out as finite numbers.
    """

    def word(value: int) -> Expr:
        return const(value, "uint32", lanes)

    def number(value: float) -> Expr:
        return const(value, "float32", lanes)

    exponent = bind((bits >> word(10)) & word(31))
    mantissa = bind(bits & word(1023))
    # 112: what float32's exponent bias is above float16's.
    normal = bind(((exponent + word(112)) << word(23)) | (mantissa << word(13)))
    is_normal = bind(cast((exponent + word(31)) >> word(5), "float32", lanes))
    # A subnormal number is not shifted into place: devices may flush small float32 numbers to zero on the way.
    subnormal = cast(mantissa, "float32", lanes) * number(2.0**-24) * (number(1) - is_normal)
    sign = number(1) - number(2) * cast((bits >> word(15)) & word(1), "float32", lanes)
    return bind((bind(reinterpret(normal, "float32", lanes)) * is_normal + subnormal) * sign)


def element(value: Expr, index: int, lanes: int) -> Expr:
    return value if lanes == 1 else T.Shuffle([value], [index])


def spread(value: Expr, lanes: int) -> Expr:
    """``value`` in every lane."""
    return value if lanes == 1 else splat(value, lanes)


def module(kernels: list[Kernel]) -> Any:
    from tvm.script.ir_builder import ir as I

    with IRBuilder() as builder, I.ir_module():
        for kernel in kernels:
            kernel.body()
    return builder.get()


def put(buffer: Any, index: Expr, value: Expr) -> None:
    T.buffer_store(buffer, value, [index])
