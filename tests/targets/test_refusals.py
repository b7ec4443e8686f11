"""What the library refuses, and what it says: at session creation where it can, else in the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import op_cases
import op_check
import pytest
from onnx import TensorProto, helper
from op_libraries import Build, runnable

from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_targets.spec import KernelSpec

pytestmark = pytest.mark.heavy

PROFILE = SliceProfile((2, 2, 2, 2))
OPS = r"(RoutedMatMul|SlicedGather|GatedSilu) \""
N, K, GROUP = 40, 128, 64


@pytest.fixture(scope="module")
def built(library: Build) -> Path:
    return library(runnable()[0].name, KernelSpec(PROFILE, GROUP))


@pytest.fixture
def weight() -> Any:
    return op_cases.weight(np.random.default_rng(0), N, K, GROUP)


def refused(tmp_path: Path, library: Path, model: onnx.ModelProto, feeds: dict[str, Any] | None = None) -> str:
    """The message with which a session (or, given feeds, a run) fails."""
    onnx.save(model, tmp_path / "m.onnx")
    if feeds is None:
        with pytest.raises(Exception, match=OPS) as caught:
            op_check.open_session(tmp_path / "m.onnx", library)
    else:
        session = op_check.open_session(tmp_path / "m.onnx", library)
        with pytest.raises(Exception, match=OPS) as caught:
            session.run(None, feeds)
    return str(caught.value)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"slices": [3, 1, 2, 2]}, "slices is 3,1,2,2, this library was built for 2,2,2,2"),
        ({"slices": [2, 2, 4]}, "slices is 2,2,4"),
        ({"group_size": 32}, "group_size is 32, this library was built for 64"),
        ({"K": 100}, "K=100: N must be at least 1 and K a multiple of the group size 64"),
        ({"N": 0}, "N=0"),
        ({"N": 100}, "planes_1 holds 1536 bytes, N=100 and K=128 need 3584"),
        ({"K": 64}, "planes_1 holds 1536 bytes, N=40 and K=64 need 768"),
    ],
)
def test_attributes(tmp_path: Path, built: Path, weight: Any, attributes: dict[str, Any], message: str) -> None:
    model = op_cases.matmul_model(weight, PROFILE, op_cases.stored(weight, PROFILE), **attributes)
    text = refused(tmp_path, built, model)
    assert message in text
    assert 'RoutedMatMul "RoutedMatMul_node"' in text


def test_planes_too_short(tmp_path: Path, built: Path, weight: Any) -> None:
    constants = op_cases.stored(weight, PROFILE)
    constants["planes_3"] = constants["planes_3"][:-1]
    model = op_cases.matmul_model(weight, PROFILE, constants)
    assert "planes_3 holds 1535 bytes, N=40 and K=128 need 1536" in refused(tmp_path, built, model)


def test_scales_of_another_shape(tmp_path: Path, built: Path, weight: Any) -> None:
    constants = op_cases.stored(weight, PROFILE)
    constants["scales"] = constants["scales"].transpose(0, 2, 1)
    assert "need [3, 6, 32]" in refused(tmp_path, built, op_cases.matmul_model(weight, PROFILE, constants))


def test_planes_given_at_run_time_are_checked_too(tmp_path: Path, built: Path, weight: Any) -> None:
    constants = op_cases.stored(weight, PROFILE)
    given = {
        "x": np.ones((1, 1, K), np.float32),
        **op_cases.dictated(np.ones((1, 1), np.int32)),
        **op_cases.router_constants(op_cases.dictating(PROFILE.depths)),
        **{name: value for name, value in constants.items() if name.startswith("planes")},
        "planes_2": constants["planes_2"][:-64],
    }
    inputs = {name: (helper.np_dtype_to_tensor_dtype(value.dtype), value.shape) for name, value in given.items()}
    attrs = {"N": N, "K": K, "group_size": GROUP, "slices": [2, 2, 2, 2]}
    scales = {"scales": constants["scales"]}
    model = op_cases.op_model("RoutedMatMul", inputs, scales, (TensorProto.FLOAT, [1, 1, N]), **attrs)
    model.graph.node[0].output.append("depth")
    assert "planes_2 holds 1472 bytes" in refused(tmp_path, built, model, given)


@pytest.mark.parametrize("bad", [5, 8])
def test_depth_out_of_range(tmp_path: Path, built: Path, weight: Any, bad: int) -> None:
    """A router of more depths than the weight has slices."""
    model = op_cases.routed_model(weight, PROFILE, op_cases.dictating(8), op_cases.DICTATED_WIDTH)
    feeds = {"x": np.ones((1, 2, K), np.float32), **op_cases.dictated(np.array([[1, bad]], np.int32))}
    assert f"depth[1] is {bad}, slices 2,2,2,2 allow 1 to 4" in refused(tmp_path, built, model, feeds)


def test_router_of_too_many_depths(tmp_path: Path, built: Path, weight: Any) -> None:
    model = op_cases.routed_model(weight, PROFILE, op_cases.dictating(9), op_cases.DICTATED_WIDTH)
    feeds = {"x": np.ones((1, 1, K), np.float32), **op_cases.dictated(np.ones((1, 1), np.int32))}
    assert "bias has 8 values and norm_gain 8: both must have one per depth" in refused(tmp_path, built, model, feeds)


def test_width_of_x(tmp_path: Path, built: Path, weight: Any) -> None:
    model = op_cases.matmul_model(weight, PROFILE, op_cases.stored(weight, PROFILE))
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "k"
    feeds = {"x": np.ones((1, 1, 64), np.float32), **op_cases.dictated(np.ones((1, 1), np.int32))}
    assert "the last dimension of x is 64, it must be 128" in refused(tmp_path, built, model, feeds)


@pytest.mark.parametrize("depth", [0, 5])
def test_gather_depth(tmp_path: Path, built: Path, weight: Any, depth: int) -> None:
    model = op_cases.gather_model(weight, PROFILE, depth)
    assert f"depth is {depth}, slices 2,2,2,2 allow 1 to 4" in refused(tmp_path, built, model)


@pytest.mark.parametrize("index", [-1, N, 2**62])
def test_gather_index(tmp_path: Path, built: Path, weight: Any, index: int) -> None:
    """Also the padding rows of the last block are out of reach."""
    model = op_cases.gather_model(weight, PROFILE, 4)
    feeds = {"indices": np.array([[0, index]], np.int64), "avg_bits": np.array([3, 4], np.float32)}
    assert f"index {index} is outside the table's {N} rows" in refused(tmp_path, built, model, feeds)


def test_the_deepest_depth(tmp_path: Path, built: Path, weight: Any) -> None:
    model = op_cases.gather_model(weight, PROFILE, 4)
    for deepest in (0, np.nan):
        feeds = {"indices": np.array([[0]], np.int64), "avg_bits": np.array([3, deepest], np.float32)}
        assert f"the deepest depth is {deepest:g}, it must be at least 1" in refused(tmp_path, built, model, feeds)


def test_router_shapes(tmp_path: Path, built: Path, weight: Any) -> None:
    model = op_cases.routed_model(weight, PROFILE, op_cases.router_params(np.random.default_rng(0), 4, K, 8), K)
    model.graph.input[1].type.tensor_type.shape.dim[2].dim_param = "k"
    feeds = {
        "x": np.ones((1, 1, K), np.float32),
        "routed_by": np.ones((1, 1, 96), np.float32),
        "avg_bits": np.array([3, 4], np.float32),
    }
    assert "w1 must be [H, 96]" in refused(tmp_path, built, model, feeds)


@pytest.mark.parametrize(("batch", "rows"), [(1, 4), (2, 1)])
def test_rows_that_are_not_routed(tmp_path: Path, built: Path, weight: Any, batch: int, rows: int) -> None:
    """More rows than are routed, or the last ones of a batch, whose places nobody told."""
    router = op_cases.router_params(np.random.default_rng(0), 4, 64, 0)
    model = op_cases.routed_model(weight, PROFILE, router, 64)
    feeds = {
        "x": np.ones((batch, rows, K), np.float32),
        "routed_by": np.ones((batch, 3, 64), np.float32),
        "avg_bits": np.array([3, 4], np.float32),
    }
    message = refused(tmp_path, built, model, feeds)
    assert f"x has {batch * rows} rows and routed_by {batch * 3}: needed as many, or fewer in a batch of one" in message


def test_routers_width(tmp_path: Path, built: Path, weight: Any) -> None:
    model = op_cases.routed_model(weight, PROFILE, op_cases.router_params(np.random.default_rng(0), 4, 64, 0), 64)
    model.graph.input[1].type.tensor_type.shape.dim[2].dim_param = "k"
    feeds = {
        "x": np.ones((1, 1, K), np.float32),
        "routed_by": np.ones((1, 1, 50), np.float32),
        "avg_bits": np.array([3, 4], np.float32),
    }
    message = refused(tmp_path, built, model, feeds)
    assert "the last dimension of routed_by is 50, it must be a multiple of 32" in message


def test_a_width_without_halves(tmp_path: Path, built: Path) -> None:
    inputs: op_cases.Inputs = {"x": (TensorProto.FLOAT, ["b", "k"])}
    model = op_cases.op_model("GatedSilu", inputs, {}, (TensorProto.FLOAT, ["b", "f"]))
    message = refused(tmp_path, built, model, {"x": np.ones((2, 48), np.float32)})
    assert "the last dimension of x is 48, it must be a multiple of 32" in message
