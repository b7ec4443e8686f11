"""What a graph may ask for, and the numbers that shapes follow from."""

from __future__ import annotations

from typing import Any

import pytest

from mbq_runtime.bundle.expressions import is_quick
from mbq_runtime.bundle.operators import Constant, Function, Node, Reference
from mbq_runtime.bundle.shapes import Bounds, Value, bounds, infer

MOST = Bounds(numbers=1000, work=10**6)
X = {"x": Value((1, 5, 8)), "w": Value((8, 8)), "column": Value((60, 1)), "row": Value((1, 60))}


def node(op: str, inputs: str, output: str, **attributes: Any) -> Node:
    return Node(op, inputs.split(), [output], output, attributes)


def shape(*nodes: Node, most: Bounds = MOST, **functions: Function) -> tuple[int, ...]:
    """The shape of y."""
    return infer(nodes, functions, X, most)["y"].shape


def test_a_value_is_as_large_as_its_inputs_or_the_bound() -> None:
    assert shape(node("MatMul", "x w", "y")) == (1, 5, 8)
    with pytest.raises(ValueError, match=r"node 'y' \(Add\) makes 3600 numbers at a time, needed at most 1000"):
        shape(node("Add", "column row", "y"))


def test_all_products_together_have_a_bound() -> None:
    chain = [node("MatMul", f"{'x' if i == 0 else f'y{i - 1}'} w", f"y{i}") for i in range(10)]
    assert len(infer(chain, {}, X, Bounds(1000, 10 * 5 * 8 * 8))) == len(X) + 10
    with pytest.raises(ValueError, match=r"node 'y9' \(MatMul\) is one product more than the weights need"):
        infer(chain, {}, X, Bounds(1000, 10 * 5 * 8 * 8 - 1))


def test_products_in_functions_count_for_each_call() -> None:
    body = Function(["a"], ["b"], [node("ai.mbq.GatedSilu", "a", "half"), node("Concat", "half half", "b", axis=-1)])
    calls = [node("call", "x", "y0"), node("call", "y0", "y")]
    assert shape(*calls, call=body) == (1, 5, 8)
    squared = Function(["a", "b"], ["c"], [node("MatMul", "a b", "c")])
    calls = [node("call", "x w", "y0"), node("call", "y0 w", "y")]
    assert shape(*calls, call=squared, most=Bounds(1000, 2 * 5 * 8 * 8)) == (1, 5, 8)
    with pytest.raises(ValueError, match="one product more"):
        shape(*calls, call=squared, most=Bounds(1000, 2 * 5 * 8 * 8 - 1))


def test_attributes_of_a_call_reach_its_function() -> None:
    body = Function(["a"], ["b"], [node("com.microsoft.MatMulNBits", "a", "b", N=Reference("N"), K=Reference("K"))])
    assert shape(node("call", "x", "y", N=3, K=8), call=body) == (1, 5, 3)
    with pytest.raises(ValueError, match="does not fit its inputs"):
        shape(node("call", "x", "y", N=3), call=body)


@pytest.mark.parametrize("number", [1 << 62, -(1 << 63)])
def test_numbers_that_would_wrap_are_refused(number: int) -> None:
    nodes = [node("Constant", "", "n", value=Constant((1,), (number,))), node("Mul", "n n", "y")]
    with pytest.raises(ValueError, match="does not fit"):
        shape(*nodes)


def test_a_shape_is_read_from_the_numbers_of_nodes() -> None:
    nodes = [
        node("Shape", "x", "rows", start=1, end=2),
        node("Constant", "", "rest", value=Constant((2,), (2, -1))),
        node("Concat", "rows rest", "to", axis=0),
        node("Reshape", "x to", "y"),
    ]
    assert shape(*nodes) == (5, 2, 4)
    with pytest.raises(ValueError, match="does not fit"):
        shape(node("Reshape", "x w", "y"))


def test_numbers_that_would_wrap_in_32_bits_are_refused() -> None:
    nodes = [node("Constant", "", "n", value=Constant((1,), (1 << 20,))), node("Mul", "n n", "y")]
    with pytest.raises(ValueError, match="does not fit"):
        shape(*nodes)


@pytest.mark.parametrize("flag", [2, -1, None, [1]])
def test_a_flag_is_yes_or_no(flag: object) -> None:
    assert shape(node("ReduceSum", "x", "y", keepdims=1)) == (1, 1, 1)
    with pytest.raises(ValueError, match="does not fit"):
        shape(node("ReduceSum", "x", "y", keepdims=flag))


def test_a_shape_that_data_decides_gives_no_numbers() -> None:
    """What is inferred is the largest shape: a Slice behind its end would be the smallest."""
    found = node("NonZero", "x", "found")
    assert infer([found], {}, X, MOST)["found"].varies
    nodes = [found, node("Shape", "found", "sides"), node("Slice", "x sides sides", "y")]
    with pytest.raises(ValueError, match=r"'y' \(Slice\) does not fit"):
        shape(*nodes)
    scattered = [found, node("ScatterND", "x found found", "y"), node("Shape", "y", "sides")]
    assert infer(scattered, {}, X, MOST)["sides"].numbers == (1, 5, 8)


def test_outputs_that_no_exported_graph_has_are_refused() -> None:
    node_of = Node("com.microsoft.SkipSimplifiedLayerNormalization", ["x", "x"], ["y", "", "", "sum"], "y")
    assert infer([node_of], {}, X, MOST)["sum"].shape == (1, 5, 8)
    node_of.outputs[1] = "mean"
    with pytest.raises(ValueError, match="gives 'mean', which the exporter does not ask for"):
        infer([node_of], {}, X, MOST)


def test_a_token_has_as_many_experts_as_rows_of_them() -> None:
    shapes = {"x": (1, 5, 8), "e": (1, 5, 2), "by": (1, 5, 16), "own": (1, 5, 2, 8)}
    values = {name: Value(shape) for name, shape in shapes.items()}

    def made(x: str, **changes: Any) -> tuple[int, ...]:
        op = node("ai.mbq.ExpertsMatMul", f"{x} e by", "y", **{"N": 30, "K": 8, "experts": 3, **changes})
        return infer([op], {}, values, MOST)["y"].shape

    assert made("x") == made("own") == (1, 5, 2, 10)
    for x, changes in (("by", {}), ("x", {"N": 31}), ("x", {"experts": 1}), ("x", {"K": 16})):
        with pytest.raises(ValueError, match="does not fit its inputs"):
            made(x, **changes)


def test_a_memory_gets_a_decay_and_a_strength_of_each_token() -> None:
    shapes = {"q": (1, 5, 6), "k": (1, 5, 6), "v": (1, 5, 16), "s": (1, 4, 3, 4), "d": (1, 5, 4), "b": (1, 5, 4)}
    heads = {"q_num_heads": 2, "kv_num_heads": 4}
    net = Node("com.microsoft.LinearAttention", list("qkvsdb"), ["y", "after"], "y", heads)  # type: ignore[arg-type]
    found = infer([net], {}, {name: Value(shape) for name, shape in shapes.items()}, MOST)
    assert (found["y"].shape, found["after"].shape) == ((1, 5, 16), (1, 4, 3, 4))
    others = [
        ("q", (1, 4, 6)),
        ("k", (1, 5, 3)),
        ("v", (1, 5, 12)),
        ("s", (1, 4, 4, 4)),
        ("d", (1, 1, 4)),
        ("b", (1, 5, 1)),
    ]
    for name, other in others:
        with pytest.raises(ValueError, match="does not fit"):
            infer([net], {}, {n: Value(other if n == name else shape) for n, shape in shapes.items()}, MOST)


def test_bounds_follow_from_the_model() -> None:
    assert bounds(128, 1000, 50_000, 10**6).numbers == 2 * 128 * 1000
    assert bounds(1, 1000, 50_000, 10**6).numbers == 2 * 50_000


@pytest.mark.parametrize(
    "expression",
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r" {2,}",
        r"\p{N}{1,3}",
        r"[一-龥ぁ-ゟ]+",
        "",
    ],
)
def test_expressions_of_published_models_are_quick(expression: str) -> None:
    assert is_quick(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "(a+)+b", "(a|a)*b", "a*a*b", "a?a?a?aaa", "a{9,9}a{9,9}a{9,9}", "a{9999}", "a.*b", r"\s*[\r\n]+", r"\s+$",
        "a*?b", "a++", "(?>a)", "(?=a+b)", r"\1", r"(?<n>a)\g<n>", "(a", "[a", "a|b)c(", "\\", "a" * 2000,
    ],
)  # fmt: skip
def test_other_expressions_are_not(expression: str) -> None:
    assert not is_quick(expression)
