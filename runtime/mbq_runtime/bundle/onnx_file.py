"""Reads the initialisers of an ONNX file without the onnx package.

An ONNX file is a protocol-buffers message: tagged fields, each a number or a run of bytes.  Weights in another file are
named, not opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ..errors import BundleError

# Field numbers of onnx.proto.
_MODEL_GRAPH = 7
_GRAPH_INITIALIZER = 5
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_EXTERNAL = 1, 2, 8, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2

ELEMENT_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
"""Bytes of an element, by onnx.TensorProto.DataType."""

UINT8, FLOAT16 = 2, 10


@dataclass(frozen=True)
class Tensor:
    """One initialiser.

    name: its name in the graph.
    shape: its dimensions.
    element_type: onnx.TensorProto.DataType.
    file: name of the file that holds its content; "" for the ONNX file itself.
    offset: place of the content in that file, in bytes.
    length: size of the content, in bytes.
    """

    name: str
    shape: tuple[int, ...]
    element_type: int
    file: str
    offset: int
    length: int

    @property
    def bytes(self) -> int:
        """Size that follows from shape and type."""
        return prod(self.shape) * ELEMENT_BYTES.get(self.element_type, 0)


def initializers(path: Path) -> list[Tensor]:
    """All initialisers of a graph.

    Args:
        path: ONNX file.

    Raises:
        BundleError: the file cannot be read or is no ONNX file.
    """
    try:
        data = memoryview(path.read_bytes())
        return [
            _tensor(tensor)
            for number, graph in _fields(data)
            if number == _MODEL_GRAPH
            for inner, tensor in _fields(_run(graph))
            if inner == _GRAPH_INITIALIZER
        ]
    except (IndexError, ValueError, TypeError) as error:
        raise BundleError(f"{path}: not an ONNX file ({error}); copy or export the bundle again") from None
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror})") from None


def _tensor(field: int | memoryview) -> Tensor:
    shape: list[int] = []
    name, element_type = "", 0
    external: dict[str, str] = {}
    for number, value in _fields(_run(field)):
        if number == _TENSOR_DIMS:
            shape += [value] if isinstance(value, int) else _varints(value)
        elif number == _TENSOR_TYPE and isinstance(value, int):
            element_type = value
        elif number == _TENSOR_NAME:
            name = _text(value)
        elif number == _TENSOR_EXTERNAL:
            entry = {inner: _text(text) for inner, text in _fields(_run(value))}
            external[entry.get(_ENTRY_KEY, "")] = entry.get(_ENTRY_VALUE, "")
    tensor = Tensor(name, tuple(shape), element_type, external.get("location", ""), int(external.get("offset", 0)), 0)
    length = int(external.get("length", tensor.bytes))
    return Tensor(tensor.name, tensor.shape, tensor.element_type, tensor.file, tensor.offset, length)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, whole number or bytes) of a message, in file order."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(data):
            raise ValueError("a field runs past the end")
        yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number runs on")


def _varints(data: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        values.append(value)
    return values


def _run(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message belongs")
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_run(value)).decode("utf-8")
