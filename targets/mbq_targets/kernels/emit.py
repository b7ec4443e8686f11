"""Thin helpers over the TIR builder: values are bound once, buffers are raw pointers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx import call_intrin
from tvm.tirx.script import builder as T

Expr = Any  # a TIR expression; tvm ships no type information

LANES = 16  # lanes of the code that is the same on every instruction set; LLVM splits them


def dtype(base: str, lanes: int) -> str:
    return base if lanes == 1 else f"{base}x{lanes}"


def bind(value: Expr) -> Expr:
    """Name a value, so that it is computed once."""
    return T.bind(value)


def const(value: float, base: str, lanes: int = 1) -> Expr:
    scalar = getattr(T, base)(value)
    return scalar if lanes == 1 else T.broadcast(scalar, lanes)


def splat(value: Expr, lanes: int) -> Expr:
    return T.broadcast(value, lanes)


def reinterpret(value: Expr, base: str, lanes: int) -> Expr:
    return T.reinterpret(dtype(base, lanes), value)


def cast(value: Expr, base: str, lanes: int) -> Expr:
    return T.cast(value, dtype(base, lanes))


def fma(a: Expr, b: Expr, c: Expr) -> Expr:
    return bind(T.fma(a, b, c))


def intrin(result: str, name: str, *args: Expr) -> Expr:
    return T.call_llvm_pure_intrin(result, name, *args)


def byte_table(table: Sequence[int], lanes: int) -> Expr:
    """A 16-byte table repeated over ``lanes`` bytes."""
    words = [int.from_bytes(bytes(table[8 * i : 8 * i + 8]), "little", signed=True) for i in range(2)]
    scalars = [T.int64(word) for word in words] * (lanes // 16)
    return reinterpret(T.Shuffle(scalars, list(range(len(scalars)))), "uint8", lanes)


def load(buffer: Any, index: Expr, lanes: int) -> Expr:
    return bind(buffer[index if lanes == 1 else T.ramp(index, 1, lanes)])


def store(buffer: Any, index: Expr, lanes: int, value: Expr) -> None:
    T.buffer_store(buffer, value, [index if lanes == 1 else T.ramp(index, 1, lanes)])


def prefetch(buffer: Any, index: Expr) -> None:
    """Ask for the cache line of an element that will be read soon."""
    T.evaluate(call_intrin("void", "tirx.prefetch", T.address_of(buffer[index]), 0, 3, 1))


def registers(lanes: int, base: str) -> Any:
    """A small array LLVM turns into registers (storage scope "local" would become a heap workspace)."""
    return T.alloc_buffer((lanes,), base, scope="global")


@contextmanager
def function(name: str, pointers: dict[str, str], scalars: Sequence[str]) -> Iterator[list[Any]]:
    """A function of raw pointers {name: element type}, then int64 scalars, in that order.

    Raw pointers keep the call free of shape checks and make no alignment promise: loads are
    emitted unaligned, which costs nothing on these cores.
    """
    with T.prim_func():
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        handles = [(T.arg(arg, T.handle()), base) for arg, base in pointers.items()]
        values = [T.arg(arg, T.int64()) for arg in scalars]
        yield [T.decl_buffer((1 << 40,), base, data=handle) for handle, base in handles] + values


@contextmanager
def module() -> Iterator[IRBuilder]:
    from tvm.script.ir_builder import ir as I

    with IRBuilder() as builder, I.ir_module():
        yield builder
