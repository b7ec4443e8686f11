"""Helpers for the operations, on top of ``kernels.emit``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from tvm import DataType
from tvm.tirx.script import builder as T

from mbq_runtime.bundle.slice_profile import SliceProfile

from ..kernels.emit import Expr, bind, cast, store

PIECES = 24
"""A product is cut into this many pieces, which two, three, four, six and eight threads share equally."""


class Tensor(NamedTuple):
    """A tensor argument.

    flat: buffer of all its elements, with no promise of alignment.
    shape: int64 expressions.
    """

    flat: Any
    shape: tuple[Expr, ...]

    def at(self, index: Expr) -> Expr:
        """Pointer to an element.

        Args:
            index: the element in ``flat``.
        """
        return pointer(self.flat, index)


@contextmanager
def driver(name: str, tensors: dict[str, tuple[str, int]], integers: tuple[str, ...] = ()) -> Iterator[list[Any]]:
    """Open an operation. Yields its tensors, then its integers.

    Relax passes first the tensors, then the integers, then the tensors whose names begin with "out".

    Args:
        name: the function's symbol.
        tensors: {name: (element type, rank)}.
        integers: names of the int64 arguments.
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
    """A buffer at an address.

    Args:
        pointer: the address.
        base: element type.
    """
    return T.decl_buffer((1 << 40,), base, data=pointer)


def scratch(count: Expr, base: str) -> Any:
    """Memory of the runtime's workspace, until the function ends.

    Args:
        count: elements.
        base: element type.
    """
    return T.alloc_buffer((count,), base, scope="global")


def call(kernel: str, *args: Expr) -> None:
    """Call a kernel through its C function in ``kernels.c``.

    Args:
        kernel: its name without prefix.
        *args: its arguments.
    """
    T.evaluate(T.call_extern("int32", f"mbq_call_{kernel}", *args))


def pointer(buffer: Any, index: Expr) -> Expr:
    """Pointer to an element.

    It uses the buffer's data variable. TVM treats memory that only ``address_of`` names as unused and gives it away.

    Args:
        buffer: any buffer.
        index: the element.
    """
    size = DataType(str(buffer.dtype)).itemsize
    return bind(T.handle_add_byte_offset(buffer.data, index * T.int64(size)))


def matrix_fields(profile: SliceProfile) -> tuple[str, ...]:
    """Names of the places of a sliced matrix, as in ``mbq_export.format.planes``.

    Args:
        profile: bits of each slice.
    """
    return (*(f"planes_{e}" for e in range(1, profile.depths + 1)), "scales")


def matrix_at(weights: Tensor, places: list[Expr]) -> Callable[[], list[Expr]]:
    """What kernels take for a sliced matrix: address of the first slice, places of all slices from there, scales.

    The result is called where a kernel is called. TVM gives a buffer away after the last statement that names it.

    Args:
        weights: uint8 [bytes].
        places: in the weights in bytes, as ``matrix_fields`` names them.
    """
    *planes, scales = places
    from_first = T.alloc_buffer((len(planes),), "int64", scope="global")
    for e, place in enumerate(planes):
        store(from_first, e, 1, place - planes[0])
    first, of_scales = weights.at(planes[0]), weights.at(scales)
    return lambda: [first, pointer(from_first, T.int64(0)), of_scales]


def i64(value: Expr) -> Expr:
    """As int64.

    Args:
        value: an integer expression.
    """
    return cast(value, "int64", 1)


def each(count: Expr, body: Callable[[Expr], None]) -> None:
    """Run ``body(i)`` for i in [0, count) on all threads. A count of 1 needs no launch, which costs microseconds.

    Args:
        count: int64 expression.
        body: writes the statements for one i.
    """
    with T.If(count == T.int64(1)):
        with T.Then():
            body(T.int64(0))
        with T.Else(), T.parallel(0, count) as i:
            body(i)


def reduce(operation: str, v: Expr) -> Expr:
    """A scalar from the lanes of a vector.

    Args:
        operation: "fadd" or "fmax".
        v: float32x16.
    """
    start = [T.float32(0)] if operation == "fadd" else []
    return bind(T.call_llvm_pure_intrin("float32", f"llvm.vector.reduce.{operation}", *start, v))
