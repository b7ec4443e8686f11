"""Token weights against torch's own gradients, one layer and one window at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import write_checkpoint

from mbq_export.context import Calibration
from mbq_export.methods import Recipe
from mbq_export.model import blocks
from mbq_export.model.checkpoint import Checkpoint
from mbq_export.model.gradients import drawn
from mbq_export.model.loading import load
from mbq_export.model.source import locate
from mbq_export.slicing import importance
from mbq_export.slicing.importance import MAX_WEIGHT, token_importance
from mbq_export.store import Store
from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_runtime.errors import ModelError

WINDOWS = np.random.default_rng(0).integers(0, 250, (3, 32))


def weigh(checkpoint: Checkpoint, store: Store | None = None, seed: int = 0) -> importance.Importance:
    recipe = Recipe(SliceProfile((3, 1, 2, 2)), 64, seed=seed)
    return token_importance(Calibration(checkpoint, recipe, store or Store(None)), WINDOWS)


@pytest.fixture(params=["llama", "phi3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    monkeypatch.setattr(blocks, "fast_dtype", lambda device: torch.float32)
    return load(locate(str(write_checkpoint(tmp_path / request.param, request.param))))


def squares(checkpoint: Checkpoint, layer: str) -> NDArray[np.float32]:
    """Mean squares of the gradient by the layer's output, on the same labels, float32 [windows, context]."""
    generator, found = torch.Generator().manual_seed(0), []
    outputs: list[torch.Tensor] = []
    handle = checkpoint.linear(layer).register_forward_hook(lambda module, args, output: outputs.append(output))
    for window in torch.from_numpy(WINDOWS):
        outputs.clear()
        embedded = checkpoint.model.get_input_embeddings()(window[None]).requires_grad_()
        log_probabilities = checkpoint.model(inputs_embeds=embedded, use_cache=False).logits[0].log_softmax(-1)
        labels = drawn(log_probabilities.detach().exp(), generator)[:, None]
        (gradient,) = torch.autograd.grad(-log_probabilities.gather(1, labels).sum(), outputs)
        found.append(gradient[0].square().mean(1).numpy())
    handle.remove()
    return np.stack(found)


def test_weights_are_the_gradients_mean_squares_cut_and_of_mean_one(checkpoint: Checkpoint) -> None:
    found = weigh(checkpoint)
    layers = [name for unit in checkpoint.decoder.units() for name in unit.sources]
    assert sorted(found) == sorted(layers)
    cut = 0
    for name in layers:
        expected = squares(checkpoint, name)
        expected = np.minimum(expected / expected.mean(), MAX_WEIGHT)
        cut += int((expected == MAX_WEIGHT).sum())
        np.testing.assert_allclose(found[name], expected / expected.mean(), rtol=1e-3, atol=1e-6)
        assert found[name].mean() == pytest.approx(1, rel=1e-5)
    assert cut


def test_the_same_seed_gives_the_same_weights_another_seed_others(checkpoint: Checkpoint) -> None:
    first, again, other = weigh(checkpoint), weigh(checkpoint), weigh(checkpoint, seed=1)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
        assert not np.array_equal(first[name], other[name])


def test_weights_are_taken_from_a_store_that_holds_them(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = weigh(checkpoint, Store(tmp_path / "store", "inputs"))
    monkeypatch.delattr(importance, "backpropagate_samples")  # it must not be called again
    again = weigh(checkpoint, Store(tmp_path / "store", "inputs"))
    assert again.keys() == first.keys()
    for name in first:
        np.testing.assert_array_equal(again[name], first[name])


def test_a_layer_without_influence_weighs_all_tokens_alike(checkpoint: Checkpoint) -> None:
    with torch.no_grad():
        checkpoint.model.lm_head.weight.zero_()
    name = checkpoint.decoder.layer_units(0)["attn_out"].sources[0]
    np.testing.assert_array_equal(weigh(checkpoint)[name], np.ones(WINDOWS.shape, np.float32))


def test_gradients_that_are_not_finite_are_refused(checkpoint: Checkpoint) -> None:
    layer = checkpoint.decoder.head.sources[0]

    def poison(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: gradient * float("nan"))

    checkpoint.linear(layer).register_forward_hook(poison)
    with pytest.raises(ModelError, match=r"NaN or infinite"):
        weigh(checkpoint)
