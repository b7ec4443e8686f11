"""Figures of quality against torch's own, and which products the curve is measured in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import write_checkpoint
from torch.nn import functional

from mbq_export import quality
from mbq_export.context import Calibration
from mbq_export.methods import Recipe
from mbq_export.model.loading import load
from mbq_export.model.sliced_linear import SlicedLinear, sliced_layers
from mbq_export.model.source import locate
from mbq_export.slicing import rtn
from mbq_export.tuning.teacher import Teacher
from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_runtime.errors import ModelError

PROFILE = SliceProfile((3, 1, 2, 2))
WINDOWS = np.random.default_rng(0).integers(0, 250, (3, 80))  # more tokens than are computed together


@pytest.mark.parametrize("depth", [1, 4])
def test_figures_are_those_of_their_definitions(tmp_path: Path, depth: int) -> None:
    checkpoint = load(locate(str(write_checkpoint(tmp_path / "llama", "llama"))))
    calibration = Calibration(checkpoint, Recipe(PROFILE, 32))
    original = Teacher(calibration, WINDOWS, exact=True)
    slices = {unit.name: rtn.slice_unit(checkpoint, unit, 32, PROFILE) for unit in checkpoint.decoder.units()}

    def logits() -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = checkpoint.model(torch.from_numpy(WINDOWS), use_cache=False).logits
        return found

    expected = logits().log_softmax(-1)
    with sliced_layers(checkpoint, slices, PROFILE, SlicedLinear) as layers:
        for parts in layers.values():
            for layer in parts:
                layer.bits = PROFILE.depth_bits[depth - 1]
        predicted = logits().log_softmax(-1)
    everywhere = dict.fromkeys(slices, lambda x: torch.full((len(x),), depth))
    (measured,) = quality.measure(calibration, slices, original, [everywhere])
    divergence = functional.kl_div(predicted, expected, log_target=True, reduction="none").sum(-1).mean(-1)
    np.testing.assert_allclose(measured.divergence, divergence, rtol=1e-3, atol=1e-6)
    nll = functional.nll_loss(predicted[:, :-1].transpose(1, 2), torch.from_numpy(WINDOWS[:, 1:]), reduction="none")
    np.testing.assert_allclose(measured.nll, nll.mean(-1), rtol=1e-5)
    same = (predicted.argmax(-1) == expected.argmax(-1)).double().mean()
    assert measured.same_top == pytest.approx(float(same))
    assert measured.avg_bits_used == PROFILE.depth_bits[depth - 1]


@pytest.mark.parametrize("nll", [[700.0], [1, 1e4], [np.inf, 1], [np.nan]])
def test_a_model_that_predicts_nothing_is_refused(nll: list[float]) -> None:
    windows = np.array(nll, np.float64)
    for measure in (quality.perplexity, lambda nll: quality.Measured(nll, nll, 0.0, 8.0).perplexity):
        with pytest.raises(ModelError, match=r"^the model predicts nothing: its loss .* nats a token, under 700 is "):
            measure(windows)


def test_a_perplexity_is_the_exponential_of_the_mean() -> None:
    assert quality.perplexity(np.array([1.0, 3.0])) == pytest.approx(np.exp(2))
    assert np.isfinite(quality.perplexity(np.array([699.0])))


def test_deep_budgets_of_the_curve_are_measured_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[torch.dtype, list[Any]]] = []

    def measure(*args: Any, stage: str, dtype: torch.dtype) -> list[Any]:
        cases: Sequence[Any] = args[3]
        asked.append((dtype, list(cases)))
        return list(cases)

    class Anywhere:
        device = torch.device("cpu")

    monkeypatch.setattr(quality, "measure", measure)
    monkeypatch.setattr(quality, "fast_dtype", lambda device: torch.bfloat16)
    calibration = Calibration(Anywhere(), Recipe(PROFILE, 32))  # type: ignore[arg-type]
    cases: Any = [(3.0, "a"), (8.0, "b"), (5.0, "c"), (6.0, "d")]
    assert quality.curve(calibration, {}, None, cases) == ["a", "b", "c", "d"]  # type: ignore[arg-type, comparison-overlap]
    assert asked == [(torch.bfloat16, ["a", "c"]), (torch.float32, ["b", "d"])]
    asked.clear()
    monkeypatch.setattr(quality, "fast_dtype", lambda device: torch.float32)
    assert quality.curve(calibration, {}, None, cases) == ["a", "b", "c", "d"]  # type: ignore[arg-type, comparison-overlap]
    assert asked == [(torch.float32, ["a", "b", "c", "d"])]
