"""Slice gains against torch's own gradients, and with outlier tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import write_checkpoint

from mbq_export.context import Calibration
from mbq_export.format.codes import Sliced
from mbq_export.methods import Recipe
from mbq_export.model import blocks
from mbq_export.model.checkpoint import Checkpoint
from mbq_export.model.gradients import drawn
from mbq_export.model.loading import load
from mbq_export.model.sliced_linear import SlicedLinear, sliced_layers, values_at
from mbq_export.model.source import locate
from mbq_export.routing.slice_gains import measure_gains, without_outliers
from mbq_export.slicing import rtn
from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_runtime.errors import ModelError

PROFILE = SliceProfile((2, 2, 2, 2))
WINDOWS = np.random.default_rng(0).integers(0, 250, (2, 600))
UNIT = "layers.0.mlp_out"


def predicted_losses(checkpoint: Checkpoint, slices: dict[str, Sliced]) -> NDArray[np.float64]:
    """float64 [tokens, depths] of ``UNIT``, on the labels that ``measure_gains`` draws with seed 0."""
    generator, found = torch.Generator().manual_seed(0), []
    weights = [values_at(slices[UNIT], PROFILE, depth) for depth in range(1, PROFILE.depths + 1)]
    with sliced_layers(checkpoint, slices, PROFILE, SlicedLinear) as layers:
        seen: list[torch.Tensor] = []
        (layer,) = layers[UNIT]
        layer.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
        for window in torch.from_numpy(WINDOWS):
            seen.clear()
            embedded = checkpoint.model.get_input_embeddings()(window[None]).requires_grad_()
            log_probabilities = checkpoint.model(inputs_embeds=embedded, use_cache=False).logits[0].log_softmax(-1)
            labels = drawn(log_probabilities.detach().exp(), generator)[:, None]
            x, output = seen
            (gradient,) = torch.autograd.grad(-log_probabilities.gather(1, labels).sum(), output)
            changes = [(gradient[0] * (x[0] @ (weights[-1] - weight).T)).sum(1) for weight in weights]
            found.append(0.5 * torch.stack(changes, dim=1).detach().double().numpy() ** 2)
    return np.concatenate(found)


def test_losses_are_those_of_second_order_but_for_one_token_in_a_hundred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rounded predictions would have other labels.
    monkeypatch.setattr(blocks, "fast_dtype", lambda device: torch.float32)
    checkpoint = load(locate(str(write_checkpoint(tmp_path / "llama", "llama"))))
    slices = {unit.name: rtn.slice_unit(checkpoint, unit, 64, PROFILE) for unit in checkpoint.decoder.units()}
    found = measure_gains(Calibration(checkpoint, Recipe(PROFILE, 64)), slices, WINDOWS)[UNIT].loss
    expected = predicted_losses(checkpoint, slices)
    highest = np.quantile(expected, 0.99, axis=0)
    cut = (expected > highest).any(1)
    in_a_hundred = len(expected) // 100
    assert in_a_hundred <= cut.sum() <= in_a_hundred * (PROFILE.depths - 1)
    assert (np.abs(found - expected)[~cut] <= 0.03 * expected[~cut] + 1e-3 * highest).all()
    np.testing.assert_allclose(found.max(0), highest, rtol=0.03)


@pytest.mark.parametrize("expert", [0, 3, 7])
def test_inputs_of_each_expert_are_finite(tmp_path: Path, expert: int) -> None:
    checkpoint = load(locate(str(write_checkpoint(tmp_path / "model", "qwen3_moe"))))
    slices = {unit.name: rtn.slice_unit(checkpoint, unit, 64, PROFILE) for unit in checkpoint.decoder.units()}
    last = checkpoint.decoder.layers - 1
    gates, _, _ = checkpoint.decoder.expert_layers(last)
    unit = checkpoint.decoder.layer_units(last)["experts_in"]
    (rows,) = (
        rows for name, (_, rows) in zip(unit.sources, checkpoint.layers(unit), strict=True) if name == gates[expert]
    )
    slices[unit.name].row_scale[rows] = np.nan
    with pytest.raises(ModelError, match=rf"^layers\.{last}\.experts_out: .*NaN or infinite"):
        measure_gains(Calibration(checkpoint, Recipe(PROFILE, 64)), slices, WINDOWS)


def test_a_few_spoilt_tokens_do_not_move_a_units_worth() -> None:
    clean = np.random.default_rng(0).exponential((1.0, 0.1, 0.0), (6144, 3)).astype(np.float32)
    spoilt = clean.copy()
    spoilt[[7, 3584, 3585]] = (6000.0, 4000.0, 0.0)
    assert spoilt.mean(0)[0] > 3
    np.testing.assert_allclose(without_outliers(spoilt).mean(0), clean.mean(0), rtol=0.02)
