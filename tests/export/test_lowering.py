"""A lowered decoder computes what transformers computes, for every family."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import FAMILIES, write_checkpoint

from mbq_export import bundle
from mbq_export.calibrate import Calibrated, calibrate, token_windows
from mbq_export.checkpoint import Checkpoint, load, locate
from mbq_export.lower.onnx import lower
from mbq_export.slicing.reference import decode_f32
from mbq_runtime.profile import SliceProfile

PROFILE = SliceProfile.parse("3,1,2,2")
TOKENS = np.random.default_rng(7).integers(0, 256, 40).tolist()
# Int8 activations leave 0.04 on these random models; a dropped bias, norm or wrong rotation 0.13 to 0.9.
TOLERANCE = 0.06


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load(locate(str(write_checkpoint(tmp_path_factory.mktemp("models") / request.param, request.param))))


@pytest.fixture(scope="module")
def original_logits(checkpoint: Checkpoint) -> NDArray[np.float32]:
    return _torch_logits(checkpoint)


@pytest.fixture(scope="module")
def calibrated(
    checkpoint: Checkpoint, original_logits: NDArray[np.float32], calibration_text: Path
) -> tuple[Calibrated, Checkpoint]:
    """Calibration rescales a checkpoint, so it is given a copy."""
    mine = copy.deepcopy(checkpoint)
    windows = token_windows(mine, calibration_text.read_text(), 1024)
    return calibrate(mine, windows, PROFILE, 64, "norm", seed=0), mine


def _torch_logits(checkpoint: Checkpoint) -> NDArray[np.float32]:
    with torch.no_grad():
        return np.asarray(checkpoint.model(torch.tensor([TOKENS])).logits[0].numpy())


def _session(checkpoint: Checkpoint, calibrated: Calibrated, folder: Path) -> ort.InferenceSession:
    model, tensors = lower(checkpoint, calibrated, "nbits")
    bundle.write_model(model, tensors, folder)
    return ort.InferenceSession(str(folder / "model.onnx"))


def _run(
    session: ort.InferenceSession,
    checkpoint: Checkpoint,
    tokens: list[int],
    bits: float,
    past: dict[str, object] | None = None,
) -> dict[str, NDArray[np.float32]]:
    d = checkpoint.decoder
    empty = np.zeros((1, d.kv_heads, 0, d.head_dim), np.float32)
    names = [f"{layer}.{part}" for layer in range(d.layers) for part in ("key", "value")]
    seen = 0 if past is None else past["present.0.key"].shape[2]  # type: ignore[attr-defined]
    feed = {
        "input_ids": np.array([tokens], np.int64),
        "attention_mask": np.ones((1, seen + len(tokens)), np.int64),
        "avg_bits": np.array([bits], np.float32),
        **{f"past_key_values.{n}": empty if past is None else past[f"present.{n}"] for n in names},
    }
    outputs = [o.name for o in session.get_outputs()]
    return dict(zip(outputs, session.run(outputs, feed), strict=True))


def _relative_rms(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_rescaling_keeps_the_function(
    original_logits: NDArray[np.float32], calibrated: tuple[Calibrated, Checkpoint]
) -> None:
    np.testing.assert_allclose(_torch_logits(calibrated[1]), original_logits, rtol=1e-3, atol=1e-3)


def test_logits_at_full_depth_are_those_of_transformers(
    original_logits: NDArray[np.float32], calibrated: tuple[Calibrated, Checkpoint], tmp_path: Path
) -> None:
    """Eight-bit weights and activations leave about a hundredth; a wrong graph leaves nothing alike."""
    session = _session(calibrated[1], calibrated[0], tmp_path)
    out = _run(session, calibrated[1], TOKENS, 8.0)
    assert _relative_rms(out["logits"][0], original_logits) < TOLERANCE
    assert out["avg_bits_used"] == pytest.approx(8.0)


def test_logits_at_the_lowest_depth_are_those_of_decoded_weights(
    calibrated: tuple[Calibrated, Checkpoint], tmp_path: Path
) -> None:
    result, checkpoint = calibrated
    session = _session(checkpoint, result, tmp_path)
    out = _run(session, checkpoint, TOKENS, 3.0)
    with torch.no_grad():
        model = copy.deepcopy(checkpoint.model)
        table = result.embedding or result.units["head"].sliced
        rows = torch.from_numpy(decode_f32(table, PROFILE, PROFILE.depths))
        model.get_input_embeddings().weight.copy_(
            rows / torch.from_numpy(result.head_scale) if result.embedding is None else rows
        )
        for linear in result.units.values():
            start = 0
            weight = torch.from_numpy(decode_f32(linear.sliced, PROFILE, 1))
            for name in linear.unit.sources:
                module = model.get_submodule(name)
                module.weight = torch.nn.Parameter(weight[start : start + module.out_features])
                start += module.out_features
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    assert _relative_rms(out["logits"][0], expected) < TOLERANCE
    assert out["avg_bits_used"] == pytest.approx(3.0)


def test_steps_with_a_cache_equal_one_pass(calibrated: tuple[Calibrated, Checkpoint], tmp_path: Path) -> None:
    result, checkpoint = calibrated
    session = _session(checkpoint, result, tmp_path)
    whole = _run(session, checkpoint, TOKENS, 8.0)["logits"][0]
    past = _run(session, checkpoint, TOKENS[:30], 8.0)
    for i in range(30, 34):
        past = _run(session, checkpoint, TOKENS[i : i + 1], 8.0, past)  # type: ignore[arg-type]
        np.testing.assert_allclose(past["logits"][0, 0], whole[i], atol=2e-2 * np.abs(whole).max())


def test_bits_used_is_the_parameter_weighted_average(calibrated: tuple[Calibrated, Checkpoint], tmp_path: Path) -> None:
    """Held against the routers' own reference on the graph's first input, and within the budget's reach."""
    result, checkpoint = calibrated
    session = _session(checkpoint, result, tmp_path)
    used = [float(_run(session, checkpoint, TOKENS, bits)["avg_bits_used"][0]) for bits in (3, 4, 5, 6, 7, 8)]
    assert used == sorted(used)
    assert used[0] == pytest.approx(3)
    assert used[-1] == pytest.approx(8)
    assert 3 < used[2] < 8
