"""Infers the shape of every value of an ONNX graph, for the largest pass that an engine runs.

A few nodes can ask for any amount of memory: a column plus a row, or a Gather of one row again and again.  So no value
may be larger than the widths of the model need, and no products may take more work than the weights need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from typing import Any, NamedTuple

from .layout import KEY_LANES, KV_SCALE_BYTES
from .operators import Constant, Function, Node, Reference

_MOST_NUMBERS = 64
"""Most elements of a value whose numbers are followed: shapes, axes and sizes."""

_INT64, _INT32 = 1 << 63, 1 << 31

_WORK = 32
"""Most products of two numbers, for each token and each byte of weights.

A byte has at most 8 slices.  Each takes two terms of an activation, and the head runs twice."""


class Value(NamedTuple):
    """What is known of a value before the graph runs.

    shape: its dimensions; where they depend on data, the largest.
    numbers: its elements, where they are a few whole numbers that follow from shapes and constants.
    varies: whether its shape depends on data.
    """

    shape: tuple[int, ...]
    numbers: tuple[int, ...] | None = None
    varies: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


class _Refused(ValueError):
    """The message names the node."""


@dataclass(frozen=True)
class Bounds:
    """What a graph may ask for.

    numbers: elements of a value, where none of its node's inputs has as many.
    work: products of two numbers in all nodes together.
    """

    numbers: int
    work: int


def bounds(tokens: int, width: int, vocab_size: int, weight_bytes: int) -> Bounds:
    """What a graph may ask for in one pass.

    Args:
        tokens: of the pass.
        width: of the widest row of a token, the logits aside.
        vocab_size: logits of the last token.
        weight_bytes: bytes of all weights.
    """
    terms = 2  # rows of an activation of 16 bits in a product
    return Bounds(terms * max(tokens * width, vocab_size), _WORK * tokens * weight_bytes)


def infer(
    nodes: Sequence[Node], functions: Mapping[str, Function], given: Mapping[str, Value], most: Bounds
) -> dict[str, Value]:
    """Infer all values of a graph.

    Args:
        nodes: of the graph, in the order in which they run.
        functions: by the name of their operator.
        given: inputs and initialisers by name.
        most: what the graph may ask for.

    Returns:
        All values by name.

    Raises:
        ValueError: a node takes a value that no node before it gives, does not fit its inputs, or asks for more memory
            or work than it may; the message names the node.
    """
    inference = _Inference(functions, most)
    found, _ = inference.values(nodes, given, {})
    return found


class _Inference:
    def __init__(self, functions: Mapping[str, Function], most: Bounds) -> None:
        self._functions, self._most, self._work = functions, most, 0
        self._calls: dict[Any, tuple[list[Value], int]] = {}

    def values(
        self, nodes: Sequence[Node], given: Mapping[str, Value], outer: Mapping[str, Any]
    ) -> tuple[dict[str, Value], int]:
        """All values by name, and the products that the nodes take.

        Args:
            nodes: of a graph or a function.
            given: its inputs.
            outer: attributes of the node that calls the function.
        """
        found, work = dict(given), 0
        for node in nodes:
            shown = f"node {(node.name or ''.join(node.outputs[:1]))[:80]!r} ({node.op[:80]})"
            missing = next((name for name in node.inputs if name and name not in found), "")
            if missing:
                raise _Refused(f"{shown} takes {missing[:80]!r}, which no node before it gives")
            inputs = [found[name] if name else None for name in node.inputs]
            try:
                outputs, products = self._node(node, inputs, outer)
            except _Refused:
                raise
            except (ValueError, IndexError, KeyError, TypeError, ZeroDivisionError, AttributeError):
                shapes = ", ".join(str(list(value.shape)) if value else "none" for value in inputs)
                raise _Refused(f"{shown} does not fit its inputs of shape {shapes[:200]}") from None
            most = max(self._most.numbers, *(value.size for value in inputs if value), 0)
            for name, value in zip(node.outputs, outputs, strict=False):
                if name in found:
                    raise _Refused(f"{shown} gives {name[:80]!r}, which is there already")
                if name and value is _UNUSED:
                    raise _Refused(f"{shown} gives {name[:80]!r}, which the exporter does not ask for")
                if value.size > most:
                    raise _Refused(f"{shown} makes {value.size} numbers at a time, needed at most {most}")
                if name:
                    found[name] = value
            work += products
            if work > self._most.work:
                raise _Refused(f"{shown} is one product more than the weights need")
        return found, work

    def _node(self, node: Node, inputs: list[Value | None], outer: Mapping[str, Any]) -> tuple[list[Value], int]:
        # A node of the graph has nothing to refer to, and a function's call gives all attributes.
        attributes = {
            name: outer[value.name] if isinstance(value, Reference) else value
            for name, value in node.attributes.items()
        }
        if node.op in self._functions:
            return self._call(node.op, inputs, attributes)
        rule = _RULES[node.op]
        outputs = rule(inputs, attributes)
        if any(side < 0 for value in outputs for side in value.shape):
            raise ValueError
        if node.op == "NonZero" or any(value.varies for value in inputs[: 1 if rule is _same else None] if value):
            outputs = [value if value is _UNUSED else Value(value.shape, varies=True) for value in outputs]
        inner = _INNER.get(node.op)
        return outputs, outputs[0].size * inner(inputs, attributes) if inner else 0

    def _call(self, name: str, inputs: list[Value | None], attributes: dict[str, Any]) -> tuple[list[Value], int]:
        """Equal calls are looked at once: the blocks of a decoder are alike."""
        key = (name, tuple(inputs), tuple((k, str(v)) for k, v in sorted(attributes.items())))
        if key not in self._calls:
            body = self._functions[name]
            if len(inputs) > len(body.inputs):
                raise ValueError
            given = {inner: value for inner, value in zip(body.inputs, inputs, strict=False) if value}
            found, work = self.values(body.nodes, given, attributes)
            self._calls[key] = [found[output] for output in body.outputs], work
        return self._calls[key]


_Inputs = list[Value | None]
_Attributes = Mapping[str, Any]
_Rule = Callable[[_Inputs, _Attributes], list[Value]]


def _given(inputs: _Inputs, at: int) -> Value:
    value = inputs[at]
    if value is None:
        raise ValueError
    return value


def _optional(inputs: _Inputs, at: int) -> Value | None:
    return inputs[at] if at < len(inputs) else None


def _numbers(value: Value | None) -> tuple[int, ...]:
    """Whole numbers of one dimension that must be known."""
    if value is None or value.numbers is None or len(value.shape) != 1:
        raise ValueError
    return value.numbers


def _flag(attributes: _Attributes, name: str, default: bool) -> bool:
    """Operators disagree whether another number than 0 and 1 is a yes."""
    value = attributes.get(name, int(default))
    if value not in (0, 1):
        raise ValueError
    return bool(value)


def _axis(attributes: _Attributes, default: int, rank: int) -> int:
    return _place(attributes.get("axis", default), rank)


def _place(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise ValueError
    return axis % rank


def _known(shape: tuple[int, ...], numbers: Sequence[int]) -> list[Value]:
    if not all(-_INT64 <= number < _INT64 for number in numbers):
        raise ValueError
    return [Value(shape, tuple(numbers) if len(numbers) <= _MOST_NUMBERS else None)]


def _wider(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of values that are spread over each other."""
    found = []
    for sides in zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1):
        longer = {side for side in sides if side != 1}
        if len(longer) > 1:
            raise ValueError
        found.append(longer.pop() if longer else 1)
    return tuple(reversed(found))


def _spread(inputs: _Inputs, _: _Attributes) -> list[Value]:
    return [Value(_wider(*(value.shape for value in inputs if value)))]


def _arithmetic(count: Callable[[int, int], int]) -> _Rule:
    """Of two values, whose numbers are counted with where they are known."""

    def rule(inputs: _Inputs, attributes: _Attributes) -> list[Value]:
        (found,) = _spread(inputs, attributes)
        a, b = (_given(inputs, at).numbers for at in (0, 1))
        if a is None or b is None or len(found.shape) > 1:
            return [found]
        numbers = [count(a[i % len(a)], b[i % len(b)]) for i in range(found.size)]
        if not all(-_INT32 <= number < _INT32 for number in numbers):
            raise ValueError  # numbers of 32 bits wrap
        return _known(found.shape, numbers)

    return rule


def _same(inputs: _Inputs, _: _Attributes) -> list[Value]:
    return [Value(_given(inputs, 0).shape)]


def _quotient(a: int, b: int) -> int:
    if min(a, b) < 0:
        raise ValueError
    return a // b


def _shape(inputs: _Inputs, attributes: _Attributes) -> list[Value]:
    shape = _given(inputs, 0).shape
    part = shape[slice(attributes.get("start", 0) + 0, attributes.get("end", len(shape)) + 0)]
    return _known((len(part),), part)


def _constant(_: _Inputs, attributes: _Attributes) -> list[Value]:
    (value,) = attributes.values()
    return [Value(value.shape, value.numbers)] if isinstance(value, Constant) else _known((), [value + 0])


def _filled(inputs: _Inputs, _: _Attributes) -> list[Value]:
    return [Value(_numbers(inputs[0]))]


def _concat(inputs: _Inputs, attributes: _Attributes) -> list[Value]:
    values = [_given(inputs, at) for at in range(len(inputs))]
    first = values[0].shape
    axis = _axis(attributes, 0, len(first))
    for value in values:
        if len(value.shape) != len(first) or any(
            a != b for i, (a, b) in enumerate(zip(value.shape, first, strict=True)) if i != axis
        ):
            raise ValueError
    shape = (*first[:axis], sum(value.shape[axis] for value in values), *first[axis + 1 :])
    if len(first) > 1 or any(value.numbers is None for value in values):
        return [Value(shape)]
    return _known(shape, [number for value in values for number in _numbers(value)])


def _gather(inputs: _Inputs, attributes: _Attributes) -> list[Value]:
    data, rows = _given(inputs, 0), _given(inputs, 1)
    axis = _axis(attributes, 0, len(data.shape))
    shape = data.shape[:axis] + rows.shape + data.shape[axis + 1 :]
    if data.numbers is None or rows.numbers is None or len(data.shape) != 1:
        return [Value(shape)]
    return _known(shape, [data.numbers[row] for row in rows.numbers])


def _gather_nd(inputs: _Inputs, attributes: _Attributes) -> list[Value]:
    data, rows = _given(inputs, 0).shape, _given(inputs, 1).shape
    if attributes.get("batch_dims", 0) or not 0 < rows[-1] <= len(data):
        raise ValueError
    return [Value(rows[:-1] + data[rows[-1] :])]


def _slice(inputs: _Inputs, _: _Attributes) -> list[Value]:
    shape = list(_given(inputs, 0).shape)
    starts, ends = _numbers(inputs[1]), _numbers(inputs[2])
    axes = _numbers(inputs[3]) if _optional(inputs, 3) else range(len(starts))
    steps = _numbers(inputs[4]) if _optional(inputs, 4) else [1] * len(starts)
    places = [_place(axis, len(shape)) for axis in axes]
    for start, end, axis, step in zip(starts, ends, places, steps, strict=True):
        if step < 1 or places.count(axis) > 1:
            raise ValueError
        shape[axis] = len(range(shape[axis])[start:end:step])
    return [Value(tuple(shape))]


def _split(inputs: _Inputs, attributes: _Attributes) -> list[Value]:
    shape = _given(inputs, 0).shape
    axis = _axis(attributes, 0, len(shape))
    parts = attributes.get("num_outputs", 0)
    sizes = _numbers(inputs[1]) if len(inputs) > 1 else (shape[axis] // parts,) * min(parts, _MOST_NUMBERS)
    if sum(sizes) != shape[axis] or min(sizes) < 0:
        raise ValueError
    return [Value((*shape[:axis], size, *shape[axis + 1 :])) for size in sizes]


def _reshape(inputs: _Inputs, attributes: _Attributes) -> list[Value]:
    data, sizes = _given(inputs, 0), _numbers(inputs[1])
    empty = _flag(attributes, "allowzero", False)
    shape = [data.shape[i] if size == 0 and not empty else size for i, size in enumerate(sizes)]
    if -1 in shape:
        at = shape.index(-1)
        shape[at] = data.size // prod(shape[:at] + shape[at + 1 :])
    if min(shape, default=0) < 0 or prod(shape) != data.size:
        raise ValueError
    return [Value(tuple(shape), data.numbers)]


def _flatten(inputs: _Inputs, attributes: _Attributes) -> list[Value]:
    shape = _given(inputs, 0).shape
    axis = attributes.get("axis", 1)
    if not -len(shape) <= axis <= len(shape):
        raise ValueError
    return [Value((prod(shape[:axis]), prod(shape[axis:])))]


def _unsqueeze(inputs: _Inputs, _: _Attributes) -> list[Value]:
    shape, axes = _given(inputs, 0).shape, _numbers(inputs[1])
    rank = len(shape) + len(axes)
    places, sides = {_place(axis, rank) for axis in axes}, iter(shape)
    if len(places) != len(axes):
        raise ValueError
    return [Value(tuple(1 if i in places else next(sides) for i in range(rank)))]


def _transpose(inputs: _Inputs, attributes: _Attributes) -> list[Value]:
    shape = _given(inputs, 0).shape
    order = attributes.get("perm", list(range(len(shape)))[::-1])
    if sorted(order) != list(range(len(shape))):
        raise ValueError
    return [Value(tuple(shape[i] for i in order))]


def _reduce(inputs: _Inputs, attributes: _Attributes) -> list[Value]:
    shape = _given(inputs, 0).shape
    axes = _numbers(inputs[1]) if _optional(inputs, 1) else range(len(shape))
    if _flag(attributes, "noop_with_empty_axes", False) or not axes:
        raise ValueError  # no axis means all or none
    places = {_place(axis, len(shape)) for axis in axes}
    if len(places) != len(axes):
        raise ValueError
    return [_without(shape, places, attributes)]


def _arg(inputs: _Inputs, attributes: _Attributes) -> list[Value]:
    shape = _given(inputs, 0).shape
    return [_without(shape, {_axis(attributes, 0, len(shape))}, attributes)]


def _without(shape: tuple[int, ...], places: set[int], attributes: _Attributes) -> Value:
    kept = _flag(attributes, "keepdims", True)
    return Value(tuple(1 if i in places else side for i, side in enumerate(shape) if kept or i not in places))


def _non_zero(inputs: _Inputs, _: _Attributes) -> list[Value]:
    value = _given(inputs, 0)
    if not value.shape:
        raise ValueError
    return [Value((len(value.shape), value.size))]


def _pad(inputs: _Inputs, _: _Attributes) -> list[Value]:
    shape, by = _given(inputs, 0).shape, _numbers(inputs[1])
    if len(inputs) > 3 or len(by) != 2 * len(shape):
        raise ValueError
    sides = tuple(side + a + b for side, a, b in zip(shape, by, by[len(shape) :], strict=False))
    if min(sides) < 0:
        raise ValueError
    return [Value(sides)]


def _product(inputs: _Inputs, _: _Attributes) -> list[Value]:
    a, b = _given(inputs, 0).shape, _given(inputs, 1).shape
    if min(len(a), len(b)) < 2 or a[-1] != b[-2]:
        raise ValueError
    return [Value((*_wider(a[:-2], b[:-2]), a[-2], b[-1]))]


def _gemm(inputs: _Inputs, attributes: _Attributes) -> list[Value]:
    a, b = _given(inputs, 0).shape, _given(inputs, 1).shape
    a = a[::-1] if _flag(attributes, "transA", False) else a
    b = b[::-1] if _flag(attributes, "transB", False) else b
    if len(a) != 2 or len(b) != 2 or a[1] != b[0]:
        raise ValueError
    added = _optional(inputs, 2)
    if added and _wider((a[0], b[1]), added.shape) != (a[0], b[1]):
        raise ValueError
    return [Value((a[0], b[1]))]


def _packed_product(inputs: _Inputs, attributes: _Attributes) -> list[Value]:
    shape = _given(inputs, 0).shape
    if shape[-1] != attributes["K"]:
        raise ValueError
    return [Value((*shape[:-1], attributes["N"]))]


def _routed_product(inputs: _Inputs, attributes: _Attributes) -> list[Value]:
    return [*_packed_product(inputs, attributes), Value(_given(inputs, 1).shape[:-1])]


def _of_experts(inputs: _Inputs, attributes: _Attributes) -> list[Value]:
    """[1, tokens, K] or [1, tokens, used, K], and the experts of each token [1, tokens, used]."""
    x, chosen, routed = (_given(inputs, at).shape for at in range(3))
    rows, count = attributes["N"], attributes["experts"]
    if len(chosen) != 3 or x not in ((*chosen[:2], attributes["K"]), (*chosen, attributes["K"])):
        raise ValueError
    if routed[:-1] != chosen[:2] or not 0 < chosen[2] <= count or rows % count:
        raise ValueError
    return [Value((*chosen, rows // count)), Value(routed[:-1])]


def _largest(inputs: _Inputs, attributes: _Attributes) -> list[Value]:
    """The largest numbers along the last axis, and their places."""
    shape, (count,) = _given(inputs, 0).shape, _numbers(inputs[1])
    if _axis(attributes, -1, len(shape)) != len(shape) - 1 or not 0 < count <= shape[-1]:
        raise ValueError
    return [Value((*shape[:-1], count))] * 2


def _scattered(inputs: _Inputs, attributes: _Attributes) -> list[Value]:
    """Numbers put to places along the last axis."""
    data, places, numbers = (_given(inputs, at).shape for at in range(3))
    if _axis(attributes, 0, len(data)) != len(data) - 1 or places != numbers or places[:-1] != data[:-1]:
        raise ValueError
    return [Value(data)]


def _picked(inputs: _Inputs, attributes: _Attributes) -> list[Value]:
    """Numbers of places along the last axis."""
    data, places = (_given(inputs, at).shape for at in range(2))
    if _axis(attributes, 0, len(data)) != len(data) - 1 or places[:-1] != data[:-1]:
        raise ValueError
    return [Value(places)]


def _packed_gather(inputs: _Inputs, attributes: _Attributes) -> list[Value]:
    return [Value((*_given(inputs, 0).shape, attributes["K"]))]


def _gate(inputs: _Inputs, _: _Attributes) -> list[Value]:
    shape = _given(inputs, 0).shape
    return [Value((*shape[:-1], shape[-1] // 2))]


def _norm(inputs: _Inputs, _: _Attributes) -> list[Value]:
    """The values between are the mean and the deviation."""
    x = Value(_given(inputs, 0).shape)
    return [x, _UNUSED, _UNUSED, x]


def _rotated(inputs: _Inputs, attributes: _Attributes) -> list[Value]:
    """Heads of a row, behind the tokens that the cache holds already."""
    x, past = _given(inputs, 0).shape, _given(inputs, 1).shape
    if len(x) != 3 or past != (1,) or x[-1] % attributes["num_heads"]:
        raise ValueError
    return [Value(x)]


def _convolution(inputs: _Inputs, _: _Attributes) -> list[Value]:
    """[1, channels, tokens], taps [channels, 1, k] and a state [1, channels, k - 1]."""
    x, taps, state = (_given(inputs, at).shape for at in (0, 1, 3))
    if len(x) != 3 or taps[:2] != (x[1], 1) or state != (x[0], x[1], taps[2] - 1):
        raise ValueError
    return [Value(x), Value(state)]


def _delta_gates(inputs: _Inputs, _: _Attributes) -> list[Value]:
    return [Value(_given(inputs, 0).shape)] * 2


def _delta_memory(inputs: _Inputs, attributes: _Attributes) -> list[Value]:
    """Queries and keys [1, tokens, heads * key_dim], values, and a memory [1, heads, key_dim, value_dim].

    A decay and a strength for each head: the operator itself does not look at how many tokens they are of.
    """
    query, key, value, memory, decay, strength = (_given(inputs, at).shape for at in range(6))
    few, many = attributes["q_num_heads"], attributes["kv_num_heads"]
    if len(query) != 3 or len(memory) != 4 or memory[:2] != (query[0], many):
        raise ValueError
    if {decay, strength} != {(*query[:2], many)}:
        raise ValueError
    if key != query or query[-1] != few * memory[2] or value != (*query[:2], many * memory[3]) or many % few:
        raise ValueError
    return [Value(value), Value(memory)]


def _attention(inputs: _Inputs, attributes: _Attributes) -> list[Value]:
    """Query, key and value in one or in three; the cache has all positions already."""
    query, past = _given(inputs, 0).shape, _given(inputs, 3).shape
    heads, pairs = attributes["num_heads"], attributes["kv_num_heads"]
    stacked = heads if _optional(inputs, 1) else heads + 2 * pairs
    if len(query) != 3 or past[1] != pairs or query[-1] != stacked * past[3]:
        raise ValueError
    return [Value((*query[:2], heads * past[3])), *[Value(past)] * 2]


def _cached_attention(inputs: _Inputs, attributes: _Attributes) -> list[Value]:
    """As ``_attention``, over a cache of bytes: a row has a scale behind its codes."""
    query, keys, values, past = (_given(inputs, at).shape for at in (0, 3, 4, 5))
    heads, pairs, head_dim = attributes["num_heads"], attributes["kv_num_heads"], keys[3] - KV_SCALE_BYTES
    separate = [value.shape for value in inputs[1:3] if value]
    stacked = heads if separate else heads + 2 * pairs
    if separate not in ([], [(*query[:2], pairs * head_dim)] * 2) or query[0] != 1 or past != (1,):
        raise ValueError
    if len(query) != 3 or keys != values or keys[1] != pairs or keys[2] % KEY_LANES or query[-1] != stacked * head_dim:
        raise ValueError
    return [Value((*query[:2], heads * head_dim)), *[Value(keys)] * 2]


_UNUSED = Value((0,))
"""An output that no exported graph has."""

_MS, _MBQ = "com.microsoft.", "ai.mbq."
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(
        ("BitShift", "BitwiseAnd", "Greater", "GreaterOrEqual", "LessOrEqual", "Max", "Min", "Where"), _spread
    ),
    **dict.fromkeys(
        (
            "Abs",
            "Cast",
            "Clip",
            "Gelu",
            f"{_MS}QuickGelu",
            "Log",
            "Round",
            "ScatterND",
            "Sigmoid",
            "Softmax",
            "Sqrt",
            "Tanh",
        ),
        _same,
    ),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceSum"), _reduce),
    **dict.fromkeys(("SimplifiedLayerNormalization", f"{_MS}SkipSimplifiedLayerNormalization"), _norm),
    **dict.fromkeys((f"{_MBQ}GatedGelu", f"{_MBQ}GatedSilu"), _gate),
    "Add": _arithmetic(lambda a, b: a + b),
    "ArgMin": _arg,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _filled,
    "Div": _arithmetic(_quotient),
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _picked,
    "GatherND": _gather_nd,
    "Gemm": _gemm,
    "MatMul": _product,
    "Mul": _arithmetic(lambda a, b: a * b),
    "NonZero": _non_zero,
    "Pad": _pad,
    "Reshape": _reshape,
    "ScatterElements": _scattered,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Sub": _arithmetic(lambda a, b: a - b),
    "TopK": _largest,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    f"{_MBQ}CachedAttention": _cached_attention,
    f"{_MBQ}ExpertsMatMul": _of_experts,
    f"{_MBQ}RoutedMatMul": _routed_product,
    f"{_MBQ}SlicedGather": _packed_gather,
    f"{_MS}CausalConvWithState": _convolution,
    f"{_MS}GatedRMSNorm": _same,
    f"{_MS}GroupQueryAttention": _attention,
    f"{_MS}LinearAttention": _delta_memory,
    f"{_MS}LinearAttentionGate": _delta_gates,
    f"{_MS}MatMulNBits": _packed_product,
    f"{_MS}RotaryEmbedding": _rotated,
}
"""Shapes of the outputs of each operator that a graph may have."""

_INNER: dict[str, Callable[[_Inputs, _Attributes], int]] = {
    "Gemm": lambda inputs, attributes: _given(inputs, 0).shape[0 if attributes.get("transA", 0) else 1],
    "MatMul": lambda inputs, _: _given(inputs, 0).shape[-1],
    f"{_MBQ}ExpertsMatMul": lambda _, attributes: int(attributes["K"]),
    f"{_MBQ}RoutedMatMul": lambda _, attributes: int(attributes["K"]),
    f"{_MS}MatMulNBits": lambda _, attributes: int(attributes["K"]),
}
"""Products for each number of the result."""
