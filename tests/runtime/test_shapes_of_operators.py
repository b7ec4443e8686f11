"""Each rule of the shape inference against ONNX Runtime: what it infers is what the operator gives, or is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mbq_runtime.bundle.onnx_file import read_graph
from mbq_runtime.bundle.shapes import Bounds, Value, infer

MOST = Bounds(numbers=10**6, work=10**9)
X = (2, 3, 4)
FLAGS = (-1, 0, 1, 2, 3, 1 << 31, (1 << 63) - 1)
AXES = (-5, -4, -3, -1, 0, 1, 2, 3, 4, 7)

Shape = tuple[int, ...]


class Case(NamedTuple):
    """One node.

    op: its operator; inputs: a shape of float32 numbers, or int64 numbers that the graph holds; attributes: its own.
    """

    op: str
    inputs: tuple[Shape | NDArray[np.int64], ...]
    attributes: dict[str, Any]


def ints(*values: int) -> NDArray[np.int64]:
    return np.asarray(values, np.int64)


def reductions() -> Iterator[Case]:
    for op, keepdims in itertools.product(("ReduceMax", "ReduceMean", "ReduceSum"), FLAGS):
        for axes in ((), (ints(),), (ints(0),), (ints(-1),), (ints(0, 2),), (ints(1, 1),), (ints(3),)):
            yield Case(op, (X, *axes), {"keepdims": keepdims})
    for flag in FLAGS:
        yield Case("ReduceSum", (X, ints()), {"noop_with_empty_axes": flag})
        yield Case("ReduceSum", (X, ints(1)), {"noop_with_empty_axes": flag})
    for keepdims, axis in itertools.product(FLAGS, AXES):
        yield Case("ArgMin", (X,), {"keepdims": keepdims, "axis": axis})


def reshapes() -> Iterator[Case]:
    wanted = [
        (0, -1),
        (2, 3, 4),
        (4, 6),
        (-1,),
        (0, 0, 0),
        (2, -1, 0),
        (-1, -1),
        (-2, 12),
        (24, 1, 1, 1),
        (),
        (0,),
        (5,),
    ]
    for shape, to, flag in itertools.product((X, (2, 0, 4), (1,)), wanted, FLAGS):
        yield Case("Reshape", (shape, ints(*to)), {"allowzero": flag})
    for shape, axis in itertools.product((X, (3,), ()), AXES):
        yield Case("Flatten", (shape,), {"axis": axis})
    for axes in ((0,), (0, 0), (-1,), (3,), (4,), (5,), (0, 2), (0, -5), (-4,), ()):
        yield Case("Unsqueeze", (X, ints(*axes)), {})
    for order in ([0, 1, 2], [2, 0, 1], [0, 1], [0, 0, 1], [0, 1, 3], [-1, 0, 1]):
        yield Case("Transpose", (X,), {"perm": order})
    yield Case("Transpose", (X,), {})


def parts() -> Iterator[Case]:
    for start, end, step in itertools.product((-9, -2, 0, 1, 5), (-9, -1, 0, 2, 1 << 62), (-1, 0, 1, 2)):
        yield Case("Slice", (X, ints(start), ints(end), ints(2), ints(step)), {})
    for axes in ((0, 1), (1, 1), (1, -2), (0, 3), (-3, 2)):
        yield Case("Slice", (X, ints(0, 1), ints(1, 9), ints(*axes)), {})
    yield Case("Slice", (X, ints(1), ints(2)), {})
    yield Case("Slice", (X, np.asarray(1, np.int64), np.asarray(2, np.int64)), {})
    for count, axis in itertools.product((0, 1, 2, 3, 4, 5), AXES):
        yield Case("Split", (X,), {"num_outputs": count, "axis": axis})
    for sizes in ((1, 3), (2, 2), (0, 4), (-1, 5), (1, 1), (4,)):
        yield Case("Split", (X, ints(*sizes)), {"axis": 2})
    for start, end in itertools.product((None, *AXES), (None, *AXES)):
        yield Case("Shape", (X,), {name: at for name, at in (("start", start), ("end", end)) if at is not None})
    for rows, axis in itertools.product((ints(0), ints(1, -1, 0), np.asarray(1, np.int64), ints(9), ints()), AXES):
        yield Case("Gather", (X, rows), {"axis": axis})
    for rows in ([[0]], [[0, 1], [1, 2]], [[0, 0, 3]], [0, 1], [[0, 0, 0, 0]], 0, [[]]):
        yield Case("GatherND", (X, np.asarray(rows, np.int64)), {})
    yield Case("GatherND", (X, ints(0, 1).reshape(2, 1)), {"batch_dims": 1})


def joins() -> Iterator[Case]:
    for other, axis in itertools.product((X, (2, 3, 1), (2, 0, 4), (2, 3), (), (0, 3, 4)), AXES):
        yield Case("Concat", (X, other), {"axis": axis})
        yield Case("Concat", (other, X), {"axis": axis})
    sides = ((), (1,), (4,), (3, 4), (3, 1), (2, 3, 4), (2, 1, 1), (0,), (5,), (1, 1, 1, 4))
    for op, (a, b) in itertools.product(("Add", "Mul", "Max"), itertools.product(sides, sides)):
        yield Case(op, (a, b), {})
    for a, b in itertools.product((X, (3, 4), (4,), (1, 2, 3, 4)), ((4, 5), (2, 4, 5), (4,), (3, 5), (2, 1, 4, 5))):
        yield Case("MatMul", (a, b), {})
    for c, trans_a, trans_b in itertools.product((None, (), (5,), (3, 1), (3, 5), (1, 3, 5), (3,)), FLAGS, FLAGS[:4]):
        a, b = (3, 4) if trans_a == 0 else (4, 3), (4, 5) if trans_b == 0 else (5, 4)
        yield Case("Gemm", (a, b) if c is None else (a, b, c), {"transA": trans_a, "transB": trans_b})
    for by in ((0,) * 6, (1, 0, 0, 0, 0, 2), (-1, 0, 0, 0, 0, 0), (-3, 0, 0, 0, 0, 0), (0, 0)):
        yield Case("Pad", (X, ints(*by)), {})
    for shape in ((), (0,), (5,), X):
        yield Case("NonZero", (shape,), {})


def choices() -> Iterator[Case]:
    for count, axis in itertools.product((-1, 0, 1, 2, 4, 5), AXES):
        yield Case("TopK", (X, ints(count)), {"axis": axis})
    yield Case("TopK", (X, ints(1)), {})
    yield Case("TopK", (X, ints(1, 2)), {"axis": -1})
    for places, axis in itertools.product(((2, 3, 1), (2, 3, 4), (2, 3, 6), (1, 3, 1), (2, 3), (2, 3, 0)), AXES):
        yield Case("GatherElements", (X, np.zeros(places, np.int64)), {"axis": axis})
        for numbers in (places, (2, 3, 1)):
            yield Case("ScatterElements", (X, np.zeros(places, np.int64), numbers), {"axis": axis})


def given(case: Case, path: Path, outputs: int) -> list[Shape] | None:
    """What ONNX Runtime gives; None where it refuses.  The graph is at ``path``."""
    names = [f"in.{i}" for i in range(len(case.inputs))]
    tensors = [(n, x) for n, x in zip(names, case.inputs, strict=True) if isinstance(x, np.ndarray)]
    feeds = {n: np.ones(x, np.float32) for n, x in zip(names, case.inputs, strict=True) if isinstance(x, tuple)}
    found = [f"out.{i}" for i in range(outputs)]
    graph = helper.make_graph(
        [helper.make_node(case.op, names, found, **case.attributes)],
        "one",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, x.shape) for n, x in feeds.items()],
        [helper.make_empty_tensor_value_info(n) for n in found],
        [numpy_helper.from_array(x, n) for n, x in tensors],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    run = onnxruntime.RunOptions()
    run.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return [np.shape(one) for one in session.run(None, feeds, run)]
    except Exception:  # the classes of its errors are many
        return None


def inferred(case: Case, path: Path, outputs: int) -> list[Value] | None:
    """What is inferred; None where it is refused."""
    graph = read_graph(path)
    values = {f"in.{i}": Value(x) for i, x in enumerate(case.inputs) if isinstance(x, tuple)}
    values |= {tensor.name: Value(tensor.shape, tensor.numbers) for tensor in graph.initializers}
    try:
        found = infer(graph.nodes, {}, values, MOST)
    except ValueError:
        return None
    return [found.get(f"out.{i}", Value((-1,))) for i in range(outputs)]


@pytest.mark.parametrize("cases", [reductions, reshapes, parts, joins, choices])
def test_what_is_inferred_is_what_the_operator_gives(cases: Any, tmp_path: Path) -> None:
    right, refused = 0, 0
    for case in cases():
        outputs = 2 if case.op == "TopK" else case.attributes.get("num_outputs", 2) if case.op == "Split" else 1
        actual = given(case, tmp_path / "one.onnx", max(outputs, 1))
        known = inferred(case, tmp_path / "one.onnx", max(outputs, 1))
        if known is None:
            refused += 1
        elif actual is not None:
            right += 1
            for value, shape in zip(known, actual, strict=True):
                if value.varies:
                    assert len(value.shape) == len(shape), case
                    assert all(a >= b for a, b in zip(value.shape, shape, strict=True)), case
                else:
                    assert value.shape == shape, case
    assert right > 15
    assert refused > 5


def test_numbers_follow_as_the_operators_count(tmp_path: Path) -> None:
    """Quotients, sums and parts of shapes decide the shapes of later values."""
    nodes = [
        helper.make_node("Shape", ["x"], ["sides"]),
        helper.make_node("Gather", ["sides", "picked"], ["some"]),
        helper.make_node("Div", ["some", "two"], ["half"]),
        helper.make_node("Concat", ["half", "rest"], ["to"], axis=0),
        helper.make_node("Reshape", ["x", "to"], ["y"]),
    ]
    constants = {"picked": ints(-1, 0), "two": ints(2), "rest": ints(-1)}
    graph = helper.make_graph(
        nodes, "some", [helper.make_tensor_value_info("x", TensorProto.FLOAT, X)],
        [helper.make_empty_tensor_value_info("y")], [numpy_helper.from_array(x, n) for n, x in constants.items()],
    )  # fmt: skip
    path = tmp_path / "some.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10), path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {"x": np.zeros(X, np.float32)})
    read = read_graph(path)
    values = {tensor.name: Value(tensor.shape, tensor.numbers) for tensor in read.initializers}
    assert infer(read.nodes, {}, {"x": Value(X), **values}, MOST)["y"].shape == actual.shape
    assert math.prod(actual.shape) == math.prod(X)
