"""The portable functions under stock ONNX Runtime, without our library, against the numpy definition.

Tolerances.  The bodies round activations to two int8 terms, as ``two_terms`` does, and MatMulNBits
(``accuracy_level=4``) does not change them.  So only the order of float32 sums differs (``FLOAT_ERROR``).  One
exception: float32 and float64 can round an activation apart that is near the middle of a step.  A test of its own
compares ``two_terms`` with the definition's rounding.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime import GraphOptimizationLevel as Level

from mbq_export.format.codes import Sliced, decode
from mbq_export.format.nbits import pack_nbits, weight_inputs
from mbq_export.format.ops import gated_gelu, gated_silu, round_activations, sliced_gather, sliced_matmul
from mbq_export.format.router import RouterParams, route, router_scores, threshold_at
from mbq_export.lower.onnx_functions import GATES, portable_functions
from mbq_export.lower.onnx_router import router_inputs
from mbq_export.lower.onnx_text import DOMAIN, DOMAIN_VERSION
from mbq_runtime.bundle.layout import SCALE_STEPS, ZERO_STEPS
from mbq_runtime.bundle.onnx_file import read_graph
from mbq_runtime.bundle.operators import unknown_node
from mbq_runtime.bundle.slice_profile import SliceProfile

Array = NDArray[Any]
F32 = NDArray[np.float32]

PROFILES = ["2,2,2,2", "3,1,2,2", "8", "4,4", "1,2,5", "1,7"]
SHAPES = [(50, 576, 32), (50, 576, 64), (33, 896, 32), (33, 896, 64), (33, 896, 128), (7, 256, 128), (16, 256, 64)]
LEVELS = [Level.ORT_DISABLE_ALL, Level.ORT_ENABLE_BASIC, Level.ORT_ENABLE_EXTENDED, Level.ORT_ENABLE_ALL]
FLOAT_ERROR = 4e-5
"""Of the largest output; 2e-5 is seen where terms cancel."""


def make_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, int]],
    outputs: Mapping[str, tuple[int, int]],
    initializers: Mapping[str, Array],
    functions: Sequence[onnx.FunctionProto],
    opset: int = 22,
) -> bytes:
    """inputs, outputs: name -> (element type, rank)."""

    def declare(values: Mapping[str, tuple[int, int]]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(name, kind, [f"{name}_{axis}" for axis in range(rank)])
            for name, (kind, rank) in values.items()
        ]

    constants = [numpy_helper.from_array(value, name) for name, value in initializers.items()]
    graph = helper.make_graph(nodes, "test", declare(inputs), declare(outputs), constants)
    domains = {"": opset, "com.microsoft": 1, DOMAIN: DOMAIN_VERSION}
    model = helper.make_model(
        graph,
        functions=functions,
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in domains.items()],
        ir_version=10,
    )
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def load(
    model: bytes,
    level: Level = Level.ORT_ENABLE_ALL,
    save: Path | None = None,
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 3
    if save is not None:
        options.optimized_model_filepath = str(save)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def random_sliced(n: int, k: int, group_size: int, rng: np.random.Generator, depths: int = 4) -> Sliced:
    """Groups whose mean is not zero: an error in the term of the group sums would show."""
    groups = (n, k // group_size)
    return Sliced(
        rng.integers(0, 256, (n, k), dtype=np.uint8),
        rng.integers(50, 256, groups, dtype=np.uint8),
        rng.integers(0, 150, groups, dtype=np.uint8),
        rng.uniform(0.01, 0.025, (n, depths)).astype(np.float16),
    )


def weighted_node(
    op: str, inputs: Sequence[str], output: str, sliced: Sliced, profile: SliceProfile, **attributes: int
) -> onnx.NodeProto:
    """A SlicedMatMul or SlicedGather whose weight inputs have the names of ``weight_inputs``."""
    n, k = sliced.codes.shape
    attributes |= {"N": n, "K": k, "group_size": sliced.group_size}
    node = helper.make_node(op, [*inputs, *weight_inputs(profile)], [output], domain=DOMAIN)
    values: dict[str, Any] = {**attributes, "slices": profile.slices}
    node.attribute.extend(helper.make_attribute(name, value) for name, value in values.items())
    return node


def matmul_model(
    sliced: Sliced, profile: SliceProfile, x_rank: int = 2, opset: int = 22, activation_bits: int = 16
) -> bytes:
    weights = pack_nbits(sliced, profile)
    node = weighted_node("SlicedMatMul", ["x", "depth"], "y", sliced, profile)
    inputs = {"x": (onnx.TensorProto.FLOAT, x_rank), "depth": (onnx.TensorProto.INT32, x_rank - 1)}
    functions = portable_functions(profile, sliced.group_size, activation_bits, mlp=False)
    return make_model([node], inputs, {"y": (onnx.TensorProto.FLOAT, x_rank)}, weights, functions, opset)


def assert_close(actual: Array, wanted: Array, error: float = FLOAT_ERROR) -> None:
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=error * float(np.abs(wanted).max()))


def two_terms(x: F32, group_size: int) -> Array:
    """x [M, K] rounded to int8 in 127 steps of each group's peak, plus its error rounded likewise; float64 [M, K]."""
    groups = x.reshape(len(x), -1, group_size)
    total, rest = np.zeros(groups.shape), groups
    for _ in range(2):
        peak = np.abs(rest).max(axis=2, keepdims=True)
        inverse = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > 0)
        term = np.rint(rest * inverse).astype(np.float64) * (peak / np.float32(127))
        total += term
        rest = (rest - term).astype(np.float32)
    return total.reshape(x.shape)


def product(x: F32, depth: NDArray[np.int32], sliced: Sliced, profile: SliceProfile) -> Array:
    """``sliced_matmul`` with the activations of ``two_terms``."""
    rows = two_terms(x, sliced.group_size)
    return np.stack([row @ decode(sliced, profile, int(d)).T for row, d in zip(rows, depth, strict=True)])


def test_two_terms_are_what_the_definition_says_to_fifteen_bits() -> None:
    x = (np.random.default_rng(3).standard_normal((20, 256)) * 10.0 ** np.arange(-10, 10)[:, None]).astype(np.float32)
    x[:, ::50] *= 30
    peak = np.repeat(np.abs(x.reshape(20, 4, 64)).max(axis=2), 64, axis=1)
    assert (np.abs(two_terms(x, 64) - round_activations(x, 64)) <= 2.0**-15 * peak).all()


@pytest.mark.parametrize("slices", PROFILES)
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_sliced_matmul_is_the_reference(slices: str, n: int, k: int, group_size: int) -> None:
    profile = SliceProfile.parse(slices)
    rng = np.random.default_rng([n, k, group_size, *profile.slices])
    sliced = random_sliced(n, k, group_size, rng)
    session = load(matmul_model(sliced, profile))
    for m in (1, 2, 5, 33):
        x = rng.standard_normal((m, k)).astype(np.float32)
        depth = rng.integers(1, profile.depths + 1, m, dtype=np.int32)
        y = session.run(None, {"x": x, "depth": depth})[0]
        assert_close(y, product(x, depth, sliced, profile))


@pytest.mark.parametrize("slices", PROFILES)
def test_one_term_is_the_reference_of_one_byte(slices: str) -> None:
    profile = SliceProfile.parse(slices)
    rng = np.random.default_rng(8)
    sliced = random_sliced(20, 256, 64, rng)
    session = load(matmul_model(sliced, profile, activation_bits=8))
    for m in (1, 33):
        x = rng.standard_normal((m, 256)).astype(np.float32)
        depth = rng.integers(1, profile.depths + 1, m, dtype=np.int32)
        y = session.run(None, {"x": x, "depth": depth})[0]
        assert_close(y, sliced_matmul(x, depth, sliced, profile, activation_bits=8))


@pytest.mark.parametrize("slices", PROFILES)
def test_every_depth_alone_and_rows_do_not_touch_each_other(slices: str) -> None:
    profile = SliceProfile.parse(slices)
    rng = np.random.default_rng(1)
    sliced = random_sliced(20, 256, 64, rng)
    session = load(matmul_model(sliced, profile))
    x = rng.standard_normal((9, 256)).astype(np.float32)
    uniform = []
    for k in range(1, profile.depths + 1):
        depth = np.full(9, k, np.int32)
        uniform.append(session.run(None, {"x": x, "depth": depth})[0])
        assert_close(uniform[-1], product(x, depth, sliced, profile))
    depth = (np.arange(9, dtype=np.int32) % profile.depths) + 1
    mixed = session.run(None, {"x": x, "depth": depth})[0]
    assert_close(mixed, np.stack([uniform[k - 1][row] for row, k in enumerate(depth)]), error=1e-6)


@pytest.mark.parametrize("lead", [(), (3,), (2, 5), (2, 1, 3)])
def test_any_rank(lead: tuple[int, ...]) -> None:
    profile = SliceProfile.parse("3,1,2,2")
    rng = np.random.default_rng(2)
    sliced = random_sliced(18, 256, 64, rng)
    session = load(matmul_model(sliced, profile, len(lead) + 1))
    rows = int(np.prod(lead))
    x = rng.standard_normal((rows, 256)).astype(np.float32)
    depth = rng.integers(1, 5, rows, dtype=np.int32)
    y = session.run(None, {"x": x.reshape(*lead, 256), "depth": depth.reshape(lead)})[0]
    assert y.shape == (*lead, 18)
    assert_close(y.reshape(rows, 18), product(x, depth, sliced, profile))


@pytest.mark.parametrize("slices", PROFILES)
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES[::3])
def test_sliced_gather_is_the_reference(slices: str, n: int, k: int, group_size: int) -> None:
    profile = SliceProfile.parse(slices)
    rng = np.random.default_rng(3)
    sliced = random_sliced(n, k, group_size, rng)
    functions = portable_functions(profile, group_size, mlp=False)
    weights = pack_nbits(sliced, profile)
    indices = np.array([[0, n - 1, 3], [3, 2, 0]], np.int64)
    for depth in range(1, profile.depths + 1):
        node = weighted_node("SlicedGather", ["indices", "avg_bits"], "rows", sliced, profile, depth=depth)
        inputs = {"indices": (onnx.TensorProto.INT64, 2), "avg_bits": (onnx.TensorProto.FLOAT, 1)}
        session = load(make_model([node], inputs, {"rows": (onnx.TensorProto.FLOAT, 3)}, weights, functions))
        for deepest in (8, 2):
            rows = session.run(None, {"indices": indices, "avg_bits": np.array([3, deepest], np.float32)})[0]
            assert rows.shape == (2, 3, k)
            wanted = sliced_gather(indices.reshape(-1), sliced, profile, min(depth, deepest))
            assert_close(rows.reshape(6, k), wanted, 1e-6)


def random_router(profile: SliceProfile, k: int, entries: int, mlp: bool, rng: np.random.Generator) -> RouterParams:
    def normal(*shape: int) -> F32:
        return rng.standard_normal(shape).astype(np.float32)

    last, hidden = profile.depths - 1, 12
    return RouterParams(
        bias=normal(last),
        norm_gain=normal(last),
        budgets=np.sort(rng.uniform(profile.min_bits, 8, entries)).astype(np.float32),
        thresholds=np.sort(normal(entries))[::-1].astype(np.float32),
        w1=normal(hidden, k).astype(np.float16) if mlp else None,
        b1=normal(hidden) if mlp else None,
        w2=normal(last, hidden) if mlp else None,
    )


def router_tensors(router: RouterParams) -> dict[str, Array]:
    """Tensors of a router, in the order of the op's inputs after x and avg_bits."""
    named = {
        "table": np.stack([router.budgets, router.thresholds]),
        "bias": router.bias,
        "norm_gain": router.norm_gain,
        "w1": router.w1,
        "b1": router.b1,
        "w2": router.w2,
    }
    return {name: value for name, value in named.items() if value is not None}


@pytest.mark.parametrize("mlp", [False, True], ids=["norm", "mlp"])
@pytest.mark.parametrize("entries", [1, 2, 9])
@pytest.mark.parametrize("slices", PROFILES)
def test_router_is_the_reference(slices: str, entries: int, mlp: bool) -> None:
    profile = SliceProfile.parse(slices)
    rng = np.random.default_rng([entries, mlp, *profile.slices])
    router = random_router(profile, 64, entries, mlp, rng)
    tensors = router_tensors(router)
    assert ("x", "avg_bits", *tensors) == router_inputs(mlp)
    node = helper.make_node("Router", ["x", "avg_bits", *tensors], ["depth"], domain=DOMAIN)
    inputs = {"x": (onnx.TensorProto.FLOAT, 3), "avg_bits": (onnx.TensorProto.FLOAT, 1)}
    functions = portable_functions(profile, 64, mlp=mlp)
    session = load(make_model([node], inputs, {"depth": (onnx.TensorProto.INT32, 2)}, tensors, functions))

    x = (rng.standard_normal((40, 64)) * np.exp(3 * rng.standard_normal((40, 1)))).astype(np.float32)
    x[0] = 0
    scores = router_scores(x, router)
    inside = np.linspace(router.budgets[0], router.budgets[-1], 7)
    seen = Counter[int]()
    for case, avg_bits in enumerate((0.0, *inside, *router.budgets, 8.0, 9.0)):
        budget, deepest = np.float32(avg_bits), 2 if case % 3 == 2 else 8
        allowed = np.array([budget, deepest], np.float32)
        depth = session.run(None, {"x": x.reshape(4, 10, 64), "avg_bits": allowed})[0]
        assert depth.shape == (4, 10)
        assert depth.dtype == np.int32
        # Tokens so close to the threshold that float32 may decide them otherwise do not count.
        clear = (np.abs(scores - threshold_at(float(budget), router)) > 1e-4).all(axis=1)
        assert clear.mean() > 0.9
        wanted = route(x, float(budget), router, deepest)
        np.testing.assert_array_equal(depth.reshape(-1)[clear], wanted[clear])
        seen.update(wanted.tolist())
    assert seen.keys() >= {1, profile.depths}


@pytest.mark.parametrize("mlp", [False, True], ids=["norm", "mlp"])
@pytest.mark.parametrize("slices", ["3,1,2,2", "8"])
def test_routed_matmul_is_both_in_one(slices: str, mlp: bool) -> None:
    """All rows are routed.  ``x`` holds only the last of them: all, one or none."""
    profile = SliceProfile.parse(slices)
    rng = np.random.default_rng([mlp, *profile.slices])
    sliced, router = random_sliced(20, 128, 64, rng), random_router(profile, 64, 5, mlp, rng)
    weights, tensors = pack_nbits(sliced, profile), router_tensors(router)
    node = weighted_node("RoutedMatMul", ["x", "routed_by", "avg_bits", *list(tensors)[:3]], "y", sliced, profile)
    node.input.extend(list(tensors)[3:])
    node.output.append("depth")
    inputs = {"x": (onnx.TensorProto.FLOAT, 3), "routed_by": (onnx.TensorProto.FLOAT, 3)}
    inputs["avg_bits"] = (onnx.TensorProto.FLOAT, 1)
    outputs = {"y": (onnx.TensorProto.FLOAT, 3), "depth": (onnx.TensorProto.INT32, 2)}
    functions = portable_functions(profile, 64, mlp=mlp)
    session = load(make_model([node], inputs, outputs, weights | tensors, functions))
    x = rng.standard_normal((1, 12, 128)).astype(np.float32)
    by = rng.standard_normal((1, 12, 64)).astype(np.float32)
    budget = np.array([router.budgets[1:3].mean(), 8], np.float32)
    for rows in (12, 1, 0):
        feed = {"x": x[:, 12 - rows :], "routed_by": by, "avg_bits": budget}
        y, depth = session.run(None, feed)
        wanted = route(by[0], float(budget[0]), router)
        np.testing.assert_array_equal(depth, wanted[None])
        assert y.shape == (1, rows, 20)
        if rows:
            assert_close(y[0], product(x[0, 12 - rows :], wanted[12 - rows :], sliced, profile))


@pytest.mark.parametrize(("op", "wanted"), [("GatedSilu", gated_silu), ("GatedGelu", gated_gelu)])
def test_gates_are_the_reference(op: str, wanted: Callable[[F32], Array]) -> None:
    assert op in GATES.values()
    node = helper.make_node(op, ["x"], ["y"], domain=DOMAIN)
    functions = portable_functions(SliceProfile.parse("8"), 64, mlp=False)
    session = load(
        make_model([node], {"x": (onnx.TensorProto.FLOAT, 3)}, {"y": (onnx.TensorProto.FLOAT, 3)}, {}, functions)
    )
    x = (np.random.default_rng(0).standard_normal((2, 5, 96)) * 4).astype(np.float32)
    assert_close(session.run(None, {"x": x})[0], wanted(x))


def test_pack_nbits_layout() -> None:
    profile = SliceProfile.parse("3,1,4")
    codes = np.zeros((1, 32), np.uint8)
    codes[0, :4] = 0b101_1_0110, 0b000_0_1111, 0b111_1_0000, 0b010_0_0001
    half, two_scales = np.array([[SCALE_STEPS // 2]], np.uint8), np.array([[2 * ZERO_STEPS]], np.uint8)
    packed = pack_nbits(Sliced(codes, half, two_scales, np.array([[0.5, 2, 1]], np.float16)), profile)
    assert tuple(packed) == weight_inputs(profile) == ("slice_1", "slice_2", "slice_3", "step", "centre", "gain")
    # Three bits in four, moved by 4; one bit in two, moved by 1; four bits as they are.
    assert packed["slice_1"][0, 0, :2].tolist() == [(5 + 4) | (0 + 4) << 4, (7 + 4) | (2 + 4) << 4]
    assert packed["slice_2"][0, 0, :1].tolist() == [(1 + 1) | (0 + 1) << 2 | (1 + 1) << 4 | (0 + 1) << 6]
    assert packed["slice_3"][0, 0, :2].tolist() == [0b0110 | 0b1111 << 4, 0b0000 | 0b0001 << 4]
    assert {name: value.shape for name, value in packed.items()} == {
        "slice_1": (1, 1, 16),
        "slice_2": (1, 1, 8),
        "slice_3": (1, 1, 16),
        "step": (1, 1),
        "centre": (1, 1),
        "gain": (4, 1),
    }
    assert packed["step"].dtype == packed["centre"].dtype == np.float32
    assert packed["step"].item() == 0.25  # scale / 2
    assert packed["centre"].item() == 0.125  # offset + 2.25 * scale


def tied_chain(calls: int, profile: SliceProfile, sliced: Sliced, router: RouterParams) -> bytes:
    """Embedding rows, then ``calls`` times Router + SlicedMatMul with the embedding's own tensors."""
    weights, tensors = pack_nbits(sliced, profile), router_tensors(router)
    nodes = [weighted_node("SlicedGather", ["indices", "avg_bits"], "rows", sliced, profile, depth=profile.depths)]
    state = "rows"
    for call in range(calls):
        depth, multiplied, following = f"depth_{call}", f"product_{call}", f"state_{call}"
        nodes += [
            helper.make_node("Router", [state, "avg_bits", *tensors], [depth], domain=DOMAIN),
            weighted_node("SlicedMatMul", [state, depth], multiplied, sliced, profile),
            helper.make_node("Tanh", [multiplied], [following]),
        ]
        state = following
    return make_model(
        nodes,
        {"indices": (onnx.TensorProto.INT64, 2), "avg_bits": (onnx.TensorProto.FLOAT, 1)},
        {state: (onnx.TensorProto.FLOAT, 3)} | {f"depth_{call}": (onnx.TensorProto.INT32, 2) for call in range(calls)},
        {**weights, **tensors},
        portable_functions(profile, sliced.group_size, mlp=router.w1 is not None),
        opset=22,
    )


@pytest.mark.parametrize("mlp", [False, True], ids=["norm", "mlp"])
def test_whole_graph_at_every_optimisation_level(mlp: bool) -> None:
    """No library is registered, so these nodes can only run as the functions."""
    profile = SliceProfile.parse("3,1,2,2")
    rng = np.random.default_rng(5)
    sliced = random_sliced(128, 128, 64, rng)
    router = random_router(profile, 128, 4, mlp, rng)
    model = tied_chain(2, profile, sliced, router)
    avg_bits = float(router.budgets[1:3].mean(dtype=np.float32))
    feed: dict[str, Array] = {
        "indices": np.arange(12, dtype=np.int64).reshape(3, 4),
        "avg_bits": np.array([avg_bits, 8], np.float32),
    }
    results = [load(model, level).run(None, feed) for level in LEVELS]
    _, *depths = results[0]

    wanted = sliced_gather(feed["indices"].reshape(-1), sliced, profile, 4).astype(np.float32)
    np.testing.assert_array_equal(depths[0].reshape(-1), route(wanted, avg_bits, router))
    for depth in (values.reshape(-1) for values in depths):
        wanted = np.tanh(product(wanted, depth, sliced, profile)).astype(np.float32)
    for state, *same_depths in results:
        np.testing.assert_array_equal(same_depths, depths)
        # An activation on the edge of two int8 values may fall to either side in the second product.
        assert_close(state.reshape(12, 128), wanted, error=1e-3)


@pytest.mark.heavy
def test_a_hundred_calls_load() -> None:
    profile = SliceProfile.parse("2,2,2,2")
    rng = np.random.default_rng(6)
    sliced = random_sliced(64, 64, 64, rng)
    session = load(tied_chain(120, profile, sliced, random_router(profile, 64, 4, True, rng)))
    feed = {"indices": np.zeros((1, 1), np.int64), "avg_bits": np.array([5.0, 8.0], np.float32)}
    state = session.run(None, feed)[0]
    assert state.shape == (1, 1, 64)
    assert np.isfinite(state).all()


@pytest.mark.parametrize("slices", ["2,2,2,2", "3,1,2,2", "4,4", "8"])
def test_optimised_graph_keeps_the_fast_form(slices: str, tmp_path: Path) -> None:
    """The int8 kernels need level 4, constant weights and scales, and no explicit zero points."""
    profile = SliceProfile.parse(slices)
    sliced = random_sliced(32, 256, 64, np.random.default_rng(7))
    load(matmul_model(sliced, profile), save=tmp_path / "optimised.onnx")
    graph = onnx.load(tmp_path / "optimised.onnx").graph
    constants = {tensor.name for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == profile.depths
    for node in products:
        values = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        assert values["accuracy_level"] == 4
        assert (values["N"], values["K"], values["block_size"]) == (32, 256, 64)
        assert len(node.input) == 3
        assert constants.issuperset(node.input[1:])
    assert {node.op_type for node in graph.node}.isdisjoint({"If", "Loop", "SlicedMatMul", "DequantizeLinear"})


def fastest(session: ort.InferenceSession, feed: Mapping[str, Array]) -> float:
    """Seconds of the fastest of 30 runs."""
    times = []
    for _ in range(30):
        start = time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize("slices", ["2,2,2,2", "3,1,2,2", "4,4", "8"])
def test_no_slow_kernel(slices: str) -> None:
    """The product of a decode step takes at most 12 times as long as a float32 product.

    Kernels that unpack to float on every call take 20 (one 8-bit slice) to 400 times (four 2-bit
    slices) as long as a float MatMul of the same shape; the int8 ones take 1 to 4 times as long.
    """
    profile = SliceProfile.parse(slices)
    size = 1024
    rng = np.random.default_rng(8)
    sliced = random_sliced(size, size, 64, rng)
    weight = decode(sliced, profile, profile.depths).T.astype(np.float32)
    node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    inputs = {"x": (onnx.TensorProto.FLOAT, 2)}
    plain = load(make_model([node], inputs, {"y": (onnx.TensorProto.FLOAT, 2)}, {"weight": weight}, []))
    session = load(matmul_model(sliced, profile))
    x = rng.standard_normal((1, size)).astype(np.float32)
    depth = np.full(1, profile.depths, np.int32)
    assert fastest(session, {"x": x, "depth": depth}) < 12 * fastest(plain, {"x": x})


@pytest.mark.parametrize("mlp", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("text", [*PROFILES, "1,1,1,1,1,1,1,1"])
def test_the_check_of_a_bundle_knows_every_operator(text: str, bits: int, mlp: bool, tmp_path: Path) -> None:
    profile = SliceProfile.parse(text)
    functions = portable_functions(profile, 64, bits, mlp=mlp)
    (tmp_path / "model.onnx").write_bytes(make_model([], {}, {}, {}, functions))
    found = read_graph(tmp_path / "model.onnx")
    assert {name: len(function.nodes) for name, function in found.functions.items()} == {
        f"{DOMAIN}.{function.name}": len(function.node) for function in functions
    }
    assert unknown_node([], found.functions, 1, profile.depths) == ""
