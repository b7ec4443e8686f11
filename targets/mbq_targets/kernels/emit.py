"""Thin helpers over TVM's TIR builder: each value is bound once, buffers are raw pointers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx import call_intrin
from tvm.tirx.script import builder as T

Expr = Any
"""A TIR expression. TVM ships no type information."""

LANES = 16
"""Lanes of the code that is the same on every instruction set. LLVM splits such vectors."""


def dtype(base: str, lanes: int) -> str:
    """TVM's name of a vector type.

    Args:
        base: element type, such as "float32".
        lanes: elements of the vector; 1 for a scalar.
    """
    return base if lanes == 1 else f"{base}x{lanes}"


def bind(value: Expr) -> Expr:
    """Give a value a name, so that the program computes it once.

    Args:
        value: any expression.
    """
    return T.bind(value)


def const(value: float, base: str, lanes: int = 1) -> Expr:
    """A constant.

    Args:
        value: the number.
        base: element type.
        lanes: elements of the result; each is ``value``.
    """
    scalar = getattr(T, base)(value)
    return scalar if lanes == 1 else T.broadcast(scalar, lanes)


def splat(value: Expr, lanes: int) -> Expr:
    """A vector with the same value in each lane.

    Args:
        value: a scalar expression.
        lanes: elements of the result.
    """
    return T.broadcast(value, lanes)


def reinterpret(value: Expr, base: str, lanes: int) -> Expr:
    """The same bits as another type.

    Args:
        value: any expression.
        base: element type of the result.
        lanes: elements of the result.
    """
    return T.reinterpret(dtype(base, lanes), value)


def cast(value: Expr, base: str, lanes: int) -> Expr:
    """The same numbers as another type.

    Args:
        value: an expression of ``lanes`` elements.
        base: element type of the result.
        lanes: elements of the result.
    """
    return T.cast(value, dtype(base, lanes))


def fma(a: Expr, b: Expr, c: Expr) -> Expr:
    """``a * b + c`` with one rounding.

    Args:
        a: first factor.
        b: second factor, of the same type.
        c: addend, of the same type.
    """
    return bind(T.fma(a, b, c))


def intrin(result: str, name: str, *args: Expr) -> Expr:
    """Call an LLVM intrinsic that has no side effects.

    Args:
        result: TVM's name of the result type.
        name: LLVM's name of the intrinsic.
        *args: its arguments.
    """
    return T.call_llvm_pure_intrin(result, name, *args)


def byte_table(table: Sequence[int], lanes: int) -> Expr:
    """A table for a byte look-up, repeated over a vector.

    Args:
        table: 16 bytes.
        lanes: bytes of the result, a multiple of 16.
    """
    words = [int.from_bytes(bytes(table[8 * i : 8 * i + 8]), "little", signed=True) for i in range(2)]
    scalars = [T.int64(word) for word in words] * (lanes // 16)
    return reinterpret(T.Shuffle(scalars, list(range(len(scalars)))), "uint8", lanes)


def load(buffer: Any, index: Expr, lanes: int) -> Expr:
    """Read neighbouring elements.

    Args:
        buffer: a buffer of scalars.
        index: the first element.
        lanes: how many elements.
    """
    return bind(buffer[index if lanes == 1 else T.ramp(index, 1, lanes)])


def store(buffer: Any, index: Expr, lanes: int, value: Expr) -> None:
    """Write neighbouring elements.

    Args:
        buffer: a buffer of scalars.
        index: the first element.
        lanes: how many elements.
        value: an expression of ``lanes`` elements.
    """
    T.buffer_store(buffer, value, [index if lanes == 1 else T.ramp(index, 1, lanes)])


def prefetch(buffer: Any, index: Expr) -> None:
    """Ask for the cache line of an element before it is read.

    Args:
        buffer: a buffer of scalars.
        index: the element.
    """
    T.evaluate(call_intrin("void", "tirx.prefetch", T.address_of(buffer[index]), 0, 3, 1))


def registers(lanes: int, base: str) -> Any:
    """A small array that LLVM keeps in registers. Storage scope "local" would become heap memory.

    Args:
        lanes: elements of the array.
        base: element type.
    """
    return T.alloc_buffer((lanes,), base, scope="global")


@contextmanager
def function(name: str, pointers: dict[str, str], scalars: Sequence[str]) -> Iterator[list[Any]]:
    """Open a function whose arguments are raw pointers, then int64 scalars. Yields them in that order.

    A call with raw pointers has no shape checks. Loads make no alignment promise, which costs nothing on these cores.

    Args:
        name: the function's symbol.
        pointers: {argument name: element type}.
        scalars: names of the int64 arguments.
    """
    with T.prim_func():
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        handles = [(T.arg(arg, T.handle()), base) for arg, base in pointers.items()]
        values = [T.arg(arg, T.int64()) for arg in scalars]
        yield [T.decl_buffer((1 << 40,), base, data=handle) for handle, base in handles] + values


@contextmanager
def module() -> Iterator[IRBuilder]:
    """Open an IRModule. Yields the builder; its ``get()`` is the module."""
    from tvm.script.ir_builder import ir as I

    with IRBuilder() as builder, I.ir_module():
        yield builder
