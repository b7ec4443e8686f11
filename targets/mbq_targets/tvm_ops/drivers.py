"""What the drivers are written with, on top of ``kernels.emit``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from tvm import DataType
from tvm.tirx.script import builder as T

from ..kernels.emit import Expr, bind, cast

PIECES = 24
"""Pieces a product is cut into: two, three, four, six and eight threads get the same number each."""


class Tensor(NamedTuple):
    """An argument.  flat: all its elements in one row, without promise of alignment; shape: int64 each."""

    flat: Any
    shape: tuple[Expr, ...]

    def at(self, index: Expr) -> Expr:
        """Pointer to an element."""
        return pointer(self.flat, index)


@contextmanager
def driver(name: str, tensors: dict[str, tuple[str, int]], integers: tuple[str, ...] = ()) -> Iterator[list[Any]]:
    """A function of tensors {name: (element type, rank)}, then int64 numbers, then the tensors whose names begin
    with "out": the order in which Relax passes them.  Yields them as they are given here.
    """
    inputs = [key for key in tensors if not key.startswith("out")]
    outputs = [key for key in tensors if key.startswith("out")]
    with T.prim_func():
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        handles = {key: T.arg(key, T.handle()) for key in inputs}
        values = [T.arg(key, T.int64()) for key in integers]
        handles |= {key: T.arg(key, T.handle()) for key in outputs}
        shapes = {key: tuple(T.int64() for _ in range(rank)) for key, (_, rank) in tensors.items()}
        bases = {key: base for key, (base, _) in tensors.items()}
        # All arguments are matched before any other statement.
        whole = {key: T.match_buffer(handles[key], shapes[key], bases[key], align=1) for key in tensors}
        yield [*(Tensor(view(whole[key].data, bases[key]), shapes[key]) for key in tensors), *values]


def view(pointer: Expr, base: str) -> Any:
    """Elements of type ``base`` at ``pointer``."""
    return T.decl_buffer((1 << 40,), base, data=pointer)


def scratch(count: Expr, base: str) -> Any:
    """``count`` elements of the runtime's workspace, until the function ends."""
    return T.alloc_buffer((count,), base, scope="global")


def call(kernel: str, *args: Expr) -> None:
    """One of the functions of ``kernels.module``, through ``kernels.c``."""
    T.evaluate(T.call_extern("int32", f"mbq_call_{kernel}", *args))


def pointer(buffer: Any, index: Expr) -> Expr:
    """Where an element lies.  By its data variable: memory that is only ever named by ``address_of`` counts as unused,
    and others get it too."""
    size = DataType(str(buffer.dtype)).itemsize
    return bind(T.handle_add_byte_offset(buffer.data, index * T.int64(size)))


def i64(value: Expr) -> Expr:
    return cast(value, "int64", 1)


def each(count: Expr, body: Callable[[Expr], None]) -> None:
    """body(i) for i in [0, count), shared out over threads unless there is but one: a launch costs microseconds."""
    with T.If(count == T.int64(1)):
        with T.Then():
            body(T.int64(0))
        with T.Else(), T.parallel(0, count) as i:
            body(i)


def reduce(operation: str, v: Expr) -> Expr:
    """fadd or fmax over the lanes of a float32x16."""
    start = [T.float32(0)] if operation == "fadd" else []
    return bind(T.call_llvm_pure_intrin("float32", f"llvm.vector.reduce.{operation}", *start, v))
