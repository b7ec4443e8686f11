"""Every op through onnxruntime against the numpy reference, for every instruction set this machine has."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import op_cases
import op_check
import pytest
from op_libraries import Build, runnable

from mbq_export.format.codes import Sliced, decode
from mbq_export.format.ops import round_activations
from mbq_runtime.bundle.layout import SCALE_STEPS, ZERO_STEPS
from mbq_runtime.bundle.slice_profile import CODE_BITS, SliceProfile
from mbq_targets.constants import FEW_TOKENS
from mbq_targets.spec import KernelSpec

pytestmark = pytest.mark.heavy

# How planes join and what is multiplied matters to each instruction set; all group sizes to the machine's best.
FEW = [
    ("2,2,2,2", 64, 16),
    ("3,1,2,2", 64, 16),
    ("3,1,2,2", 64, 8),
    ("1,1,2,2,2", 64, 16),  # lone and paired 1-bit planes
    ("3,3,2", 32, 16),  # segments that do not join
]
# Few depths, because each of them is compiled.
MORE = [
    ("4,4", 32, 8),
    ("4,4", 128, 16),  # a compiler takes four times as long for this group size
    ("8", 64, 16),  # a single depth: no router decision
]
CASES = [(t.name, *f) for i, t in enumerate(runnable()) for f in (FEW if i else FEW + MORE)]


@pytest.mark.parametrize(("target", "slices", "group", "activation_bits"), CASES)
def test_ops_agree_with_the_reference(
    target: str, slices: str, group: int, activation_bits: int, library: Build, tmp_path: Path
) -> None:
    spec = KernelSpec(SliceProfile.parse(slices), group, activation_bits)
    built = library(target, spec)
    op_cases.prepare(tmp_path, spec)
    cases = sorted(tmp_path.iterdir())
    assert len(cases) == len(op_cases.SHAPES[group]) + spec.profile.depths + 7
    assert [line for case in cases for line in op_check.check_case(case, built)] == []


@pytest.fixture(params=[t.name for t in runnable()])
def built(request: pytest.FixtureRequest, library: Build) -> Path:
    return library(request.param, KernelSpec(PROFILE, 64))


PROFILE = SliceProfile((2, 2, 2, 2))


def session(tmp_path: Path, library: Path, model: onnx.ModelProto, threads: int = 2) -> Any:
    onnx.save(model, tmp_path / "m.onnx")
    return op_check.open_session(tmp_path / "m.onnx", library, threads)


def test_threads_and_batches_do_not_change_the_result(tmp_path: Path, built: Path) -> None:
    """A token's row is the same bits alone or with others, on any pool."""
    rng = np.random.default_rng(1)
    sliced = op_cases.weight(rng, 520, 1536, 64)
    model = op_cases.matmul_model(sliced, PROFILE, op_cases.stored(sliced, PROFILE))
    x = rng.standard_normal((1, 5, 1536)).astype(np.float32)
    depth = np.array([[4, 2, 2, 1, 2]], np.int32)
    results = [
        session(tmp_path, built, model, threads).run(None, {"x": x, **op_cases.dictated(depth)})[0]
        for threads in (1, 2, 4)
    ]
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])
    run = session(tmp_path, built, model)
    for token in range(5):
        one = slice(token, token + 1)
        alone = run.run(None, {"x": x[:, one], **op_cases.dictated(depth[:, one])})[0]
        assert np.array_equal(results[0][:, one], alone)


def test_the_librarys_own_threads_do_not_change_the_result(tmp_path: Path, built: Path) -> None:
    """They share the loops of one token.  Their number is another thread's to change."""
    own = Path(shutil.copy(built, tmp_path / "own.so"))  # the number of threads is one for all sessions of a library
    rng = np.random.default_rng(1)
    sliced = op_cases.weight(rng, 2056, 1536, 64)
    model = op_cases.matmul_model(sliced, PROFILE, op_cases.stored(sliced, PROFILE))
    x = rng.standard_normal((1, 1, 1536)).astype(np.float32)
    feeds = {"x": x, **op_cases.dictated(np.array([[4]], np.int32))}
    expected = session(tmp_path, built, model, 1).run(None, feeds)[0]
    run, threads = session(tmp_path, own, model), ctypes.CDLL(str(own))
    finished = threading.Event()

    def change() -> None:
        for count in itertools.cycle((3, 1, 2, 4)):
            threads.mbq_set_threads(count)
            if finished.wait(0.002):
                return

    threads.mbq_set_threads(4)
    changing = threading.Thread(target=change)
    changing.start()
    try:
        for _ in range(500):
            assert np.array_equal(run.run(None, feeds)[0], expected)
    finally:
        finished.set()
        changing.join()
        threads.mbq_wake_threads()


def test_activations_are_rounded_as_the_reference_does(tmp_path: Path, built: Path) -> None:
    """Against an identity weight the result is the rounded input; inputs lie on the halves between two steps."""
    k = 64
    # A weight is scale * (step * (level + middle) - zero / ZERO_STEPS): zero so that a level is 0, scale so that the
    # next level is 1.
    step, middle = PROFILE.step(CODE_BITS), PROFILE.middle(CODE_BITS)
    lows = np.arange(256) / ZERO_STEPS / step - middle
    zero = int(np.flatnonzero(lows % 1 == 0)[0])
    codes = np.full((16, k), lows[zero], np.uint8) + np.eye(16, k, dtype=np.uint8)
    of_groups = (np.full((16, 1), value, np.uint8) for value in (SCALE_STEPS // 2, zero))
    sliced = Sliced(codes, *of_groups, np.full((16, 4), 2 / step, np.float16))
    np.testing.assert_allclose(decode(sliced, PROFILE, 4), np.eye(16, k), atol=1e-12)
    model = op_cases.matmul_model(sliced, PROFILE, op_cases.stored(sliced, PROFILE))
    run = session(tmp_path, built, model)
    rng = np.random.default_rng(2)
    for scale in (1e-30, 1e-3, 1.0, 7e4):
        x = (rng.standard_normal((1, 1, k)) * scale).astype(np.float32)
        x[0, 0, 20] = 127 * scale  # the step is ``scale``, give or take a rounding
        x[0, 0, :16] = (np.arange(16) - 8 + 0.5) * np.float32(scale)
        wanted = round_activations(x[0], 64)
        y = run.run(None, {"x": x, **op_cases.dictated(np.array([[4]], np.int32))})[0]
        # Finer than a low byte's step, 1 / 256 of a high one's.
        np.testing.assert_allclose(y[0, 0], wanted[0, :16], rtol=0, atol=1e-3 * scale)
        # Halves of a high byte's step are the worst: 128 low ones are clipped to 127.
        assert np.abs(wanted - x[0]).max() <= 1.01 / 256 * scale


def test_deeper_slices_are_never_read(tmp_path: Path, built: Path) -> None:
    """Poison in them changes no bit, in the kernels of one token, of few and of many."""
    rng = np.random.default_rng(6)
    sliced = op_cases.weight(rng, 40, 256, 64)
    constants = op_cases.stored(sliced, PROFILE)
    x = rng.standard_normal((1, FEW_TOKENS + 1, 256)).astype(np.float32)
    for depth in range(1, PROFILE.depths):
        poison = {f"planes_{e}": 255 - constants[f"planes_{e}"] for e in range(depth + 1, PROFILE.depths + 1)}
        clean, poisoned = (
            session(tmp_path, built, op_cases.matmul_model(sliced, PROFILE, {**constants, **more}))
            for more in ({}, poison)
        )
        for tokens in (1, 6, FEW_TOKENS + 1):
            feeds = {"x": x[:, :tokens], **op_cases.dictated(np.full((1, tokens), depth, np.int32))}
            assert np.array_equal(clean.run(None, feeds)[0], poisoned.run(None, feeds)[0])


def test_factors_of_other_depths_are_never_read(tmp_path: Path, built: Path) -> None:
    """Poison in them changes no bit, in the kernels of one token, of few and of many."""
    rng = np.random.default_rng(7)
    sliced = op_cases.weight(rng, 40, 256, 64)
    x = rng.standard_normal((1, FEW_TOKENS + 1, 256)).astype(np.float32)
    for depth in range(1, PROFILE.depths + 1):
        poisoned = replace(sliced, row_scale=np.full_like(sliced.row_scale, np.nan))
        poisoned.row_scale[:, depth - 1] = sliced.row_scale[:, depth - 1]
        runs = [
            session(tmp_path, built, op_cases.matmul_model(each, PROFILE, op_cases.stored(each, PROFILE)))
            for each in (sliced, poisoned)
        ]
        for tokens in (1, 6, FEW_TOKENS + 1):
            feeds = {"x": x[:, :tokens], **op_cases.dictated(np.full((1, tokens), depth, np.int32))}
            assert np.array_equal(*(run.run(None, feeds)[0] for run in runs))


def test_zero_input_gives_zero(tmp_path: Path, built: Path) -> None:
    rng = np.random.default_rng(3)
    sliced = op_cases.weight(rng, 20, 128, 64)
    model = op_cases.matmul_model(sliced, PROFILE, op_cases.stored(sliced, PROFILE))
    y = session(tmp_path, built, model).run(
        None, {"x": np.zeros((1, 3, 128), np.float32), **op_cases.dictated(np.array([[1, 4, 2]], np.int32))}
    )[0]
    assert np.array_equal(y, np.zeros((1, 3, 20), np.float32))


def test_no_rows(tmp_path: Path, built: Path) -> None:
    rng = np.random.default_rng(4)
    sliced = op_cases.weight(rng, 20, 128, 64)
    model = op_cases.matmul_model(sliced, PROFILE, op_cases.stored(sliced, PROFILE))
    y = session(tmp_path, built, model).run(
        None, {"x": np.zeros((1, 0, 128), np.float32), **op_cases.dictated(np.zeros((1, 0), np.int32))}
    )[0]
    assert y.shape == (1, 0, 20)


def test_shapes_are_inferred_with_their_names(tmp_path: Path, built: Path) -> None:
    """Downstream shape inference sees [b, s, N]: the names of the free dimensions pass through the op."""
    rng = np.random.default_rng(5)
    sliced = op_cases.weight(rng, 20, 128, 64)
    model = op_cases.matmul_model(sliced, PROFILE, op_cases.stored(sliced, PROFILE))
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    y, depth = session(tmp_path, built, model).get_outputs()
    assert y.shape == ["b", "s", 20]
    assert depth.shape == ["b", "t"]
