"""Reads what an ONNX file says of itself, without the onnx package.

An ONNX file is a protocol-buffers message: tagged fields, each a number or a run of bytes.  Weights in another file are
named, not opened.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from ..errors import BundleError
from .operators import Constant, Function, Node, Reference, full_name
from .reading import open_file, read_file

# Field numbers of onnx.proto.
_MODEL_GRAPH, _MODEL_OPSET, _MODEL_METADATA, _MODEL_TRAINING, _MODEL_FUNCTION = 7, 8, 14, 20, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_SPARSE = 1, 5, 11, 12, 15
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 2, 3, 4, 5, 7
_FUNCTION_NAME, _FUNCTION_INPUT, _FUNCTION_OUTPUT, _FUNCTION_ATTRIBUTE, _FUNCTION_NODE = 1, 4, 5, 6, 7
_FUNCTION_OPSET, _FUNCTION_DOMAIN, _FUNCTION_DEFAULT = 9, 10, 11
_ATTRIBUTE_NAME, _ATTRIBUTE_INT, _ATTRIBUTE_TENSOR, _ATTRIBUTE_FLOATS, _ATTRIBUTE_INTS = 1, 3, 5, 7, 8
_ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS, _ATTRIBUTE_SPARSE, _ATTRIBUTE_REFERENCE = 10, (6, 11), (22, 23), 21
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW, _TENSOR_EXTERNAL = 1, 2, 8, 9, 13
_TENSOR_INTS = {6: 5, 7: 7}
"""Field of the numbers of an int32 and of an int64 tensor."""
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR, _TENSOR_SHAPE, _SHAPE_DIM, _DIM_VALUE = 1, 2, 1, 2, 1, 1

# A field that comes twice has the last value for some readers, and both for others.  These are lists.
_MODEL_LISTS = (_MODEL_OPSET, _MODEL_METADATA, _MODEL_TRAINING, _MODEL_FUNCTION)
_GRAPH_LISTS = (_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_SPARSE, 13)
_FUNCTION_LISTS = (_FUNCTION_INPUT, _FUNCTION_OUTPUT, _FUNCTION_ATTRIBUTE, _FUNCTION_NODE, _FUNCTION_OPSET)
_NODE_LISTS = (_NODE_INPUT, _NODE_OUTPUT, _NODE_ATTRIBUTE)
_ATTRIBUTE_LISTS = (_ATTRIBUTE_FLOATS, _ATTRIBUTE_INTS, 9, _ATTRIBUTE_TENSORS)
_TENSOR_LISTS = (_TENSOR_DIMS, 4, *_TENSOR_INTS.values(), 10, 11, _TENSOR_EXTERNAL)

_MOST_BYTES = 16 << 20  # the exporter keeps larger tensors in another file
_MOST_FIELDS = 500_000  # a graph of 100 blocks has fewer than 100,000
_MOST_DIMENSIONS = 8
_LARGEST_SIZE = 1 << 40  # of a tensor along one dimension
_MOST_NUMBERS = 64  # of a tensor whose numbers are followed

ELEMENT_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
"""Bytes of an element, by onnx.TensorProto.DataType."""

UINT8 = 2


@dataclass(frozen=True)
class Tensor:
    """One initialiser.

    name: its name in the graph.
    shape: its dimensions.
    element_type: onnx.TensorProto.DataType.
    file: name of the file that holds its content; "" for the ONNX file itself.
    offset: place of the content in that file, in bytes.
    length: size of the content, in bytes.
    numbers: its elements, if they are few whole numbers that the ONNX file holds.
    """

    name: str
    shape: tuple[int, ...]
    element_type: int
    file: str
    offset: int
    length: int
    numbers: tuple[int, ...] | None = None

    @property
    def bytes(self) -> int:
        """Size that follows from shape and type."""
        return prod(self.shape) * ELEMENT_BYTES.get(self.element_type, 0)


@dataclass
class Graph:
    """What is checked of a graph.

    initializers: its weights and constants.
    inputs: dimensions of each input by name; 0 for a dimension without a number.
    outputs: the same of each output.
    nodes: its nodes.
    functions: by the names of their operators.
    opsets: versions of the operators by domain; the standard domain is "".
    attention_tables: names of the rotary tables that attention nodes read.
    outside: why the file reaches for what a decoder does not need; "" where it does not.
    """

    initializers: list[Tensor] = field(default_factory=list)
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    functions: dict[str, Function] = field(default_factory=dict)
    opsets: dict[str, int] = field(default_factory=dict)
    attention_tables: set[str] = field(default_factory=set)
    outside: str = ""


def initializers(path: Path) -> list[Tensor]:
    """All initialisers of a graph.

    Args:
        path: ONNX file.

    Raises:
        BundleError: the file cannot be read or is no ONNX file.
    """
    return read_graph(path).initializers


def read_graph(path: Path) -> Graph:
    """Read an ONNX file.

    Args:
        path: ONNX file.

    Raises:
        BundleError: the file cannot be read, is no ONNX file, or is larger than any that the exporter writes.
    """
    with open_file(path) as file:
        size = file.seek(0, 2)
        if size > _MOST_BYTES:
            raise BundleError(f"{path}: {size} bytes long, needed at most {_MOST_BYTES}; export the bundle again")
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return _Reader().model(memoryview(data))
        except (IndexError, ValueError, TypeError, RecursionError) as error:
            raise BundleError(f"{path}: not an ONNX file ({error}); copy or export the bundle again") from None


def without_absent(path: Path, held: Mapping[str, int]) -> bytes:
    """The content of an ONNX file whose tensors all lie in what is there of other files.

    A tensor of a slice that is not there gets the place 0 in its file.  Nothing reads it.

    Args:
        path: ONNX file.
        held: bytes that are there, by name of the file.

    Raises:
        BundleError: the file cannot be read, or a place cannot be changed.
    """
    data = read_file(path, _MOST_BYTES)
    for tensor in initializers(path):
        if tensor.file and tensor.offset + tensor.length > held[tensor.file]:
            # As many digits as before, so that no length in the file changes.
            digits = str(tensor.offset).encode()
            entry = b"\x0a\x06offset\x12" + bytes([len(digits)])
            if data.count(entry + digits) != 1:
                raise BundleError(f"{path}: the place of {tensor.name[:80]} cannot be found; export the bundle again")
            data = data.replace(entry + digits, entry + b"0" * len(digits))
    return data


class _Reader:
    """Walks over one file."""

    def __init__(self) -> None:
        self._graph = Graph()
        self._left = _MOST_FIELDS

    def model(self, data: memoryview) -> Graph:
        for number, value in self._fields(data, _MODEL_LISTS):
            if number == _MODEL_GRAPH:
                self._outer(_run(value))
            elif number == _MODEL_OPSET:
                self._opset(_run(value), self._graph.opsets)
            elif number == _MODEL_FUNCTION:
                self._function(_run(value))
            elif number == _MODEL_TRAINING:
                self._graph.outside = "it has a training graph"
            elif number == _MODEL_METADATA:
                self._graph.outside = "it has settings of its own (metadata)"
        return self._graph

    def _function(self, data: memoryview) -> None:
        name, domain, function = "", "", Function()
        for number, value in self._fields(data, _FUNCTION_LISTS):
            if number == _FUNCTION_NODE:
                function.nodes.append(self._node(_run(value)))
            elif number == _FUNCTION_OPSET:
                self._opset(_run(value), function.opsets)
            elif number == _FUNCTION_DEFAULT:
                self._graph.outside = "a function has attributes of its own"
            elif number == _FUNCTION_INPUT:
                function.inputs.append(_text(value))
            elif number == _FUNCTION_OUTPUT:
                function.outputs.append(_text(value))
            elif number == _FUNCTION_NAME:
                name = _text(value)
            elif number == _FUNCTION_DOMAIN:
                domain = _text(value)
        op = full_name(domain, name)
        if op in self._graph.functions:
            raise ValueError(f"the function {op[:80]} comes twice")
        self._graph.functions[op] = function

    def _opset(self, data: memoryview, found: dict[str, int]) -> None:
        domain, version = "", 0
        for number, value in self._fields(data, ()):
            if number == _OPSET_DOMAIN:
                domain = _text(value)
            elif number == _OPSET_VERSION:
                version = _signed(value)
        domain = "" if domain == "ai.onnx" else domain
        if domain in found:
            raise ValueError(f"operators of {domain[:80] or 'the standard'} are named twice")
        found[domain] = version

    def _outer(self, data: memoryview) -> None:
        for number, value in self._fields(data, _GRAPH_LISTS):
            if number == _GRAPH_INITIALIZER:
                self._graph.initializers.append(self._tensor(_run(value)))
            elif number in (_GRAPH_INPUT, _GRAPH_OUTPUT):
                name, shape = self._value(_run(value))
                values = self._graph.inputs if number == _GRAPH_INPUT else self._graph.outputs
                values[name] = shape
            elif number == _GRAPH_NODE:
                self._graph.nodes.append(self._node(_run(value)))
            elif number == _GRAPH_SPARSE:
                self._graph.outside = "it has sparse weights"

    def _node(self, data: memoryview) -> Node:
        node, op, domain = Node(), "", ""
        for number, value in self._fields(data, _NODE_LISTS):
            if number == _NODE_INPUT:
                node.inputs.append(_text(value))
            elif number == _NODE_OUTPUT:
                node.outputs.append(_text(value))
            elif number == _NODE_NAME:
                node.name = _text(value)
            elif number == _NODE_OP:
                op = _text(value)
            elif number == _NODE_DOMAIN:
                domain = _text(value)
            elif number == _NODE_ATTRIBUTE:
                self._attribute(_run(value), node)
        if op == "GroupQueryAttention":
            self._graph.attention_tables.update(node.inputs[7:9])
        if op == "CachedAttention":
            self._graph.attention_tables.update(node.inputs[6:8])
        if op == "RotaryEmbedding":
            self._graph.attention_tables.update(node.inputs[2:4])
        node.op = full_name(domain, op)
        return node

    def _attribute(self, data: memoryview, node: Node) -> None:
        name, found, numbers = "", list[int | Constant | Reference](), list[int]()
        for number, value in self._fields(data, _ATTRIBUTE_LISTS):
            if number == _ATTRIBUTE_NAME:
                name = _text(value)
            elif number == _ATTRIBUTE_INT:
                found.append(_signed(value))
            elif number == _ATTRIBUTE_INTS:
                numbers += _whole_numbers(value)
            elif number == _ATTRIBUTE_REFERENCE:
                found.append(Reference(_text(value)))
            elif number in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
                tensor = self._tensor(_run(value))
                found.append(Constant(tensor.shape, tensor.numbers))
                if tensor.file:
                    self._graph.outside = "a node reads another file"
            elif number in _ATTRIBUTE_GRAPHS:
                self._graph.outside = "a node has a graph of its own, such as a loop"
            elif number in _ATTRIBUTE_SPARSE:
                self._graph.outside = "it has sparse weights"
        if name in node.attributes or len(found) + bool(numbers) > 1:
            raise ValueError(f"the attribute {name[:80]} comes twice")
        node.attributes[name] = found[0] if found else numbers or None

    def _value(self, data: memoryview) -> tuple[str, tuple[int, ...]]:
        name, dims = "", list[int]()
        for number, value in self._fields(data):
            if number == _VALUE_NAME:
                name = _text(value)
            elif number == _VALUE_TYPE:
                for tensor in self._within(value, _TYPE_TENSOR):
                    for shape in self._within(tensor, _TENSOR_SHAPE):
                        dims += [self._dimension(dim) for dim in self._within(shape, _SHAPE_DIM)]
        return name, tuple(dims)

    def _dimension(self, data: int | memoryview) -> int:
        found = [value for value in self._within(data, _DIM_VALUE) if isinstance(value, int)]
        return found[-1] if found else 0

    def _within(self, data: int | memoryview, wanted: int) -> list[int | memoryview]:
        return [value for number, value in self._fields(_run(data)) if number == wanted]

    def _tensor(self, data: memoryview) -> Tensor:
        shape: list[int] = []
        name, element_type = "", 0
        external: dict[str, str] = {}
        raw: memoryview | None = None
        whole: dict[int, list[int]] = {field: [] for field in _TENSOR_INTS.values()}
        for number, value in self._fields(data, _TENSOR_LISTS):
            if number == _TENSOR_DIMS:
                shape += _whole_numbers(value)
            elif number == _TENSOR_TYPE and isinstance(value, int):
                element_type = value
            elif number == _TENSOR_NAME:
                name = _text(value)
            elif number == _TENSOR_RAW:
                raw = _run(value)
            elif number in whole:
                whole[number] += _whole_numbers(value)
            elif number == _TENSOR_EXTERNAL:
                entry = {inner: _text(text) for inner, text in self._fields(_run(value), ())}
                key = entry.get(_ENTRY_KEY, "")
                if key in external:
                    raise ValueError(f"{key[:40]} of {name[:80]} comes twice")
                external[key] = entry.get(_ENTRY_VALUE, "")
        if len(shape) > _MOST_DIMENSIONS:
            raise ValueError(f"{name[:80]} has {len(shape)} dimensions")
        for size in shape:
            if not 0 <= size <= _LARGEST_SIZE:
                raise ValueError(f"{name[:80]} has a size of {size}, needed 0 to {_LARGEST_SIZE}")
        file, offset = external.get("location", ""), _place(external, "offset", 0)
        tensor = Tensor(name, tuple(shape), element_type, file, offset, 0)
        length = _place(external, "length", tensor.bytes)
        numbers = None
        if element_type in _TENSOR_INTS and not file and prod(shape) <= _MOST_NUMBERS:
            numbers = _content(whole[_TENSOR_INTS[element_type]], raw, ELEMENT_BYTES[element_type])
            if len(numbers) != prod(shape):
                raise ValueError(f"{name[:80]} has {len(numbers)} numbers, needed {prod(shape)}")
            most = 1 << 8 * ELEMENT_BYTES[element_type] - 1
            if not all(-most <= found < most for found in numbers):
                raise ValueError(f"{name[:80]} has a number of more bits than its type")
        return Tensor(tensor.name, tensor.shape, element_type, file, offset, length, numbers)

    def _fields(self, data: memoryview, lists: tuple[int, ...] | None = None) -> Iterator[tuple[int, int | memoryview]]:
        """(field number, whole number or bytes) of a message, in file order.

        Args:
            data: the message.
            lists: fields that may come more than once; None for all.
        """
        at, seen = 0, set[int]()
        while at < len(data):
            self._left -= 1
            if self._left < 0:
                raise ValueError(f"more than {_MOST_FIELDS} fields")
            tag, at = _varint(data, at)
            number, kind = tag >> 3, tag & 7
            if lists is not None and number not in lists and number in seen:
                raise ValueError(f"field {number} comes twice")
            seen.add(number)
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
            if kind == 2:  # the others are floats, which nobody asks for
                yield number, data[at : at + size]
            at += size


def _place(external: dict[str, str], key: str, default: int) -> int:
    text = external.get(key)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) <= 18):
        raise ValueError(f"{key} of a tensor is {text[:40]!r}, needed a whole number")
    return int(text)


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


def _signed(value: int | memoryview) -> int:
    """A whole number, of which a file holds the two's complement."""
    if not isinstance(value, int):
        raise ValueError("bytes where a number belongs")
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _whole_numbers(value: int | memoryview) -> list[int]:
    """One number, or those of a packed list; not many more than are followed."""
    if isinstance(value, int):
        return [_signed(value)]
    values, at = list[int](), 0
    while at < len(value) and len(values) <= _MOST_NUMBERS:
        number, at = _varint(value, at)
        values.append(_signed(number))
    return values


def _content(numbers: list[int], raw: memoryview | None, bytes_each: int) -> tuple[int, ...]:
    """The numbers of a tensor, which has them as a list or as bytes."""
    if raw is None:
        return tuple(numbers)
    if numbers:
        raise ValueError("a tensor has two contents")
    starts = range(0, len(raw), bytes_each)
    return tuple(int.from_bytes(raw[at : at + bytes_each], "little", signed=True) for at in starts)


def _run(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message belongs")
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_run(value)).decode("utf-8")
