"""The operators that an exported ONNX graph has, and how many of each.

A graph can ask for any amount of memory with a few nodes: a Concat that doubles its input, again and again, or a shape
that is computed.  So each operator has its place and its count, and all others are refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

_MBQ, _MS = "ai.mbq.", "com.microsoft."
_MOST_PADDED = 1  # the exporter adds one score, and one row
_MOST_REPEATS = 2  # terms of a 16-bit activation

OPSETS = {"": range(21, 23), _MS[:-1]: range(1, 2), _MBQ[:-1]: range(1, 2)}
"""Versions of operators that the rules of ``shapes`` are right for, by domain.  Others mean something else."""

_Counts = dict[str, tuple[int, int]]

GRAPH: _Counts = {
    "Add": (3, 6),
    "Cast": (4, 0),
    "Concat": (1, 0),
    "Div": (0, 1),
    "Gather": (2, 0),
    "GatherElements": (0, 1),
    "Gelu": (0, 1),
    "MatMul": (8, 1),
    "Mul": (8, 4),
    "ReduceMean": (1, 0),
    "ReduceSum": (2, 2),
    "Reshape": (3, 9),
    "ScatterElements": (0, 1),
    "Shape": (3, 0),
    "Sigmoid": (0, 1),
    "SimplifiedLayerNormalization": (2, 9),
    "Slice": (4, 0),
    "Softmax": (0, 1),
    "Split": (0, 2),
    "Sub": (3, 1),
    "Tanh": (2, 0),
    "TopK": (0, 1),
    "Transpose": (0, 2),
    f"{_MS}CausalConvWithState": (0, 1),
    f"{_MS}GatedRMSNorm": (0, 1),
    f"{_MS}GroupQueryAttention": (0, 1),
    f"{_MS}LinearAttention": (0, 1),
    f"{_MS}LinearAttentionGate": (0, 1),
    f"{_MS}RotaryEmbedding": (0, 2),
    f"{_MS}SkipSimplifiedLayerNormalization": (1, 2),
    f"{_MBQ}CachedAttention": (0, 1),
    f"{_MBQ}ExpertsMatMul": (0, 2),
    f"{_MBQ}GatedGelu": (0, 2),
    f"{_MBQ}GatedSilu": (0, 1),
    f"{_MBQ}RoutedMatMul": (2, 7),
    f"{_MBQ}SlicedGather": (2, 0),
}
"""Most nodes of the graph by operator: a number, and a number more for each decoder block."""

_GATE: _Counts = {"Split": (1, 0), "Mul": (1, 0), "Gelu": (1, 0), f"{_MS}QuickGelu": (1, 0)}

FUNCTIONS: dict[str, _Counts] = {
    f"{_MBQ}GatedGelu": _GATE,
    f"{_MBQ}GatedSilu": _GATE,
    f"{_MBQ}RoutedMatMul": {
        "Constant": (1, 0),
        "Shape": (2, 0),
        "Slice": (1, 0),
        "Sub": (1, 0),
        f"{_MBQ}Router": (1, 0),
        f"{_MBQ}SlicedMatMul": (1, 0),
    },
    f"{_MBQ}Router": {
        "Add": (4, 0),
        "ArgMin": (1, 0),
        "Cast": (4, 0),
        "Clip": (1, 0),
        "Constant": (13, 0),
        "ConstantOfShape": (1, 0),
        "Div": (2, 0),
        "Flatten": (1, 0),
        "Gather": (8, 0),
        "Gemm": (3, 0),
        "Greater": (1, 0),
        "GreaterOrEqual": (1, 0),
        "LessOrEqual": (1, 0),
        "Log": (1, 0),
        "Min": (1, 0),
        "Mul": (3, 0),
        "Pad": (3, 0),
        "ReduceMean": (1, 0),
        "Reshape": (1, 0),
        "Shape": (1, 0),
        "Sigmoid": (1, 0),
        "Slice": (4, 0),
        "Sqrt": (1, 0),
        "Sub": (2, 0),
        "Where": (2, 0),
    },
    f"{_MBQ}SlicedGather": {
        "Add": (1, 1),
        "BitShift": (0, 1),
        "BitwiseAnd": (0, 1),
        "Cast": (1, 1),
        "Concat": (1, 0),
        "Constant": (7, 4),
        "Gather": (6, 2),
        "Min": (1, 0),
        "Mul": (2, 1),
        "Reshape": (3, 1),
        "Shape": (1, 0),
        "Sub": (0, 1),
        "Unsqueeze": (4, 1),
    },
    f"{_MBQ}SlicedMatMul": {
        "Abs": (2, 0),
        "Concat": (6, 0),
        "Constant": (14, 2),
        "Div": (5, 0),
        "Flatten": (1, 0),
        "Gather": (2, 0),
        "GatherND": (2, 1),
        "Gemm": (2, 0),
        "GreaterOrEqual": (2, 1),
        "Max": (2, 0),
        "Mul": (6, 1),
        "NonZero": (0, 1),
        "ReduceMax": (2, 0),
        "ReduceSum": (2, 0),
        "Reshape": (7, 0),
        "Round": (2, 0),
        "ScatterND": (0, 1),
        "Shape": (1, 0),
        "Sub": (3, 0),
        "Transpose": (0, 1),
        "Unsqueeze": (1, 0),
        "Where": (2, 0),
        f"{_MS}MatMulNBits": (0, 1),
    },
}
"""Most nodes of each function of a portable graph: a number, and a number more for each slice."""


class Reference(NamedTuple):
    """An attribute that a function takes from the node that calls it.

    name: of the attribute of that node.
    """

    name: str


class Constant(NamedTuple):
    """A tensor that is an attribute.

    shape: its dimensions.
    numbers: its elements, if they are few whole numbers.
    """

    shape: tuple[int, ...]
    numbers: tuple[int, ...] | None


@dataclass
class Node:
    """One node.

    op: operator, with its domain before it; the standard domain is left out.
    inputs, outputs: names of values.
    name: of the node.
    attributes: by name; a whole number, a list of them, a Constant, a Reference, or None for all else.
    """

    op: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    name: str = ""
    attributes: dict[str, int | list[int] | Constant | Reference | None] = field(default_factory=dict)

    @property
    def constant(self) -> tuple[int, ...] | None:
        """Whole numbers of a Constant; None: it has none, or too many."""
        value = self.attributes.get("value")
        return value.numbers if isinstance(value, Constant) else None


@dataclass
class Function:
    """A function that nodes call by its name.

    inputs, outputs: names of values.
    nodes: in the order in which they run.
    opsets: versions of the operators by domain; the standard domain is "".
    """

    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    opsets: dict[str, int] = field(default_factory=dict)


def full_name(domain: str, op: str) -> str:
    """An operator's name with its domain.

    Args:
        domain: "" and "ai.onnx" are the standard one.
        op: name of the operator.
    """
    return op if domain in ("", "ai.onnx") else f"{domain}.{op}"


def unknown_node(nodes: list[Node], functions: Mapping[str, Function], layers: int, slices: int) -> str:
    """What a graph has and an exported one has not; "" for nothing.

    Args:
        nodes: of the graph.
        functions: by the name of their operator.
        layers: decoder blocks.
        slices: slices of a matrix.
    """
    for name in functions:
        if name not in FUNCTIONS:
            return f"the function {name[:80]!r} is none that the exporter writes"
    found = _surplus(nodes, GRAPH, layers)
    for name, body in functions.items():
        found = found or _surplus(body.nodes, FUNCTIONS[name], slices)
    return found


def unknown_opset(opsets: Mapping[str, int], functions: Mapping[str, Function]) -> str:
    """A version of operators that no exported graph has; "" for none.

    Args:
        opsets: of the graph.
        functions: by the name of their operator.
    """
    for domain, version in opsets.items():
        if version not in OPSETS.get(domain, ()):
            shown, known = domain[:80] or "the standard", OPSETS.get(domain)
            needed = f", needed {known[0]} to {known[-1]}" if known else ", which the exporter does not use"
            return f"operators of {shown} in version {version}{needed}"
    if "" not in opsets:
        return "no version of the standard operators"
    for name, function in functions.items():
        if not function.opsets.items() <= opsets.items():
            return f"the function {name[:80]!r} has other versions of operators than the graph"
    return ""


def _surplus(nodes: list[Node], most: _Counts, times: int) -> str:
    counts = Counter[str]()
    constants = {output: node.constant for node in nodes for output in node.outputs if node.op == "Constant"}
    shapes = {output for node in nodes for output in node.outputs if node.op == "Shape"}
    for node in nodes:
        counts[node.op] += 1
        fixed, more = most.get(node.op, (0, 0))
        shown = f"node {(node.name or ''.join(node.outputs[:1]))[:80]!r} ({node.op[:80]})"
        if counts[node.op] > fixed + more * times:
            return f"{shown} is one more than the {fixed + more * times} of its kind that the exporter writes"
        second = node.inputs[1] if len(node.inputs) > 1 else ""
        if node.op == "Pad" and max(constants.get(second) or [_MOST_PADDED + 1]) > _MOST_PADDED:
            return f"{shown} adds more than the exporter does"
        if node.op == "ConstantOfShape" and not shapes.issuperset(node.inputs):
            return f"{shown} has a shape that is not that of a value"
        if node.op == "Concat" and max(Counter(node.inputs).values(), default=0) > _MOST_REPEATS:
            return f"{shown} takes a value more than {_MOST_REPEATS} times"
    return ""
