"""Layers that compute their weights from codes: outputs and gradients against torch on plain weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from shared_work import halves
from tiny_models import write_checkpoint
from torch.nn import functional

from mbq_export.compiled import compiled
from mbq_export.format.codes import Sliced, decode_f32, levels
from mbq_export.model import gradients, sliced_linear
from mbq_export.model.gradients import lean_backward
from mbq_export.model.loading import load
from mbq_export.model.sliced_linear import Bits, SlicedLinear, sliced_layers, weights
from mbq_export.model.source import locate
from mbq_export.slicing import rtn
from mbq_export.tuning.tune import TunedLinear, budget_control
from mbq_runtime.bundle.slice_profile import SliceProfile

PROFILE = SliceProfile((3, 1, 2, 2))
BIAS = torch.linspace(-1, 1, 12)


def random_slices() -> Sliced:
    rng = np.random.default_rng(0)
    codes, scales, zeros = (rng.integers(1, 256, (12, columns), np.uint8) for columns in (128, 2, 2))
    return Sliced(codes, scales, zeros, rng.uniform(0.5, 1, (12, 4)).astype(np.float16))


def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sliced_linear, "compiled", lambda source, device: None)


@pytest.fixture(params=["in C", "by torch"])
def sliced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Sliced:
    monkeypatch.setattr(sliced_linear, "_IN_CACHE", 5 * 128)  # several pieces, the last one short
    if request.param == "by torch":
        by_torch(monkeypatch)
    return random_slices()


def found_levels(sliced: Sliced, bits: int) -> torch.Tensor:
    return torch.from_numpy(levels(sliced.codes, PROFILE, bits)).float()


@pytest.mark.parametrize("kind", [SlicedLinear, TunedLinear])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_weights_are_those_of_the_definition(sliced: Sliced, kind: type[SlicedLinear], depth: int) -> None:
    layer = kind(sliced, PROFILE, None)
    bits = PROFILE.depth_bits[depth - 1]
    gain = layer.gain[:, depth - 1 : depth]
    own = layer.scale * gain, layer.offset * gain
    weight = weights(layer.codes, *own, profile=PROFILE, bits=bits, dtype=torch.float32)
    np.testing.assert_allclose(weight.detach().numpy(), decode_f32(sliced, PROFILE, depth), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slices", [(3, 1, 2, 2), (2, 2, 2, 2), (1,) * 8, (8,), (4, 4)])
def test_compiled_loops_give_the_weights_and_gradients_of_torchs_operations(
    slices: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile, layer = SliceProfile(slices), SlicedLinear(random_slices(), PROFILE, None)
    gradient = torch.randn(12, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert compiled(sliced_linear._SOURCE, torch.device("cpu")) is not None

    def computed(bits: int) -> list[torch.Tensor]:
        to_scale, to_offset = torch.ones_like(layer.scale), torch.ones_like(layer.offset)
        sliced_linear._add_gradients(to_scale, to_offset, gradient, layer.codes, profile, bits)
        found = weights(layer.codes, layer.scale, layer.offset, profile=profile, bits=bits, dtype=dtype)
        return [found, to_scale, to_offset]

    in_c = [computed(bits) for bits in profile.depth_bits]
    by_torch(monkeypatch)
    for bits, (found, *gradients_found) in zip(profile.depth_bits, in_c, strict=True):
        expected, *gradients_expected = computed(bits)
        assert torch.equal(found, expected)
        for own, others in zip(gradients_found, gradients_expected, strict=True):
            torch.testing.assert_close(own, others, rtol=1e-4, atol=1e-4)


def test_threads_do_not_change_the_weights() -> None:
    layer, threads, found = SlicedLinear(random_slices(), PROFILE, None), torch.get_num_threads(), []
    try:
        for count in (1, 5):
            torch.set_num_threads(count)
            found.append(weights(layer.codes, layer.scale, layer.offset, profile=PROFILE, bits=6, dtype=torch.bfloat16))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "bits", [*PROFILE.depth_bits, torch.full((21,), 4), torch.tensor([8, 3, 4] * 7), torch.tensor([6] * 20 + [3])]
)
def test_products_and_gradients_are_torchs_own(sliced: Sliced, bits: Bits) -> None:
    layer = TunedLinear(sliced, PROFILE, BIAS)
    layer.bits = bits
    x = torch.randn(3, 7, 128, generator=torch.Generator().manual_seed(1), requires_grad=True)
    wanted = (x, layer.scale_change, layer.offset_change, *layer.gain_changes)
    output = layer(x)
    by_hand = torch.autograd.grad(output.square().sum(), wanted)
    of_tokens = []
    for of_token, token in zip(torch.as_tensor(bits).expand(21).tolist(), x.view(21, 128), strict=True):
        cells = PROFILE.step(of_token) * (found_levels(sliced, of_token).view(12, 2, 64) + PROFILE.middle(of_token))
        weight = layer.scale[:, :, None] * cells + layer.offset[:, :, None]
        gain = layer.gain[:, PROFILE.depth_bits.index(of_token), None]
        of_tokens.append(functional.linear(token, gain * weight.view(12, 128), BIAS))
    expected = torch.stack(of_tokens).view(3, 7, 12)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-4)
    by_torch_alone = torch.autograd.grad(expected.square().sum(), wanted)
    for found, own in zip(by_hand, by_torch_alone, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-3)


def test_under_autocast_products_are_bfloat16(sliced: Sliced) -> None:
    layer, x = SlicedLinear(sliced, PROFILE, BIAS), torch.randn(7, 128, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), layer(x), rtol=0.02, atol=0.5)


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_a_backward_pass_that_runs_blocks_again_gives_the_same(
    family: str, routed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = load(locate(str(write_checkpoint(tmp_path / "model", family))))
    slices = {unit.name: rtn.slice_unit(checkpoint, unit, 64, PROFILE) for unit in checkpoint.decoder.units()}
    window = torch.arange(1, 33)[None]
    routing, occurring = (lambda avg_bits: dict.fromkeys(slices, halves), {3, 8}) if routed else (None, {8})

    def backward() -> tuple[list[NDArray[np.float32]], int]:
        runs = 0

        def count(*_: object) -> None:
            nonlocal runs
            runs += 1

        with (
            sliced_layers(checkpoint, slices, PROFILE, TunedLinear) as tuned,
            lean_backward(checkpoint),
            budget_control(checkpoint, tuned, PROFILE, routing) as use_budget,
        ):
            use_budget(8)
            counting = tuned["layers.0.mlp_in"][0].register_forward_hook(count)
            checkpoint.model(window, use_cache=False).logits.square().mean().backward()
            counting.remove()
            bits = {name: [torch.as_tensor(layer.bits) for layer in parts] for name, parts in tuned.items()}
            # All layers of a unit have the same depths.
            assert all(torch.equal(of_part, of_unit[0]) for of_unit in bits.values() for of_part in of_unit)
            assert {int(of_token) for of_unit in bits.values() for of_token in of_unit[0].unique()} == occurring
            return [layer.scale_change.grad.numpy() for parts in tuned.values() for layer in parts], runs

    kept, runs = backward()
    assert runs == 1
    monkeypatch.setattr(gradients, "KEPT_ACTIVATION_BYTES", 0)
    again, runs = backward()
    assert runs == 2
    assert all(np.array_equal(a, b) for a, b in zip(kept, again, strict=True))
    assert all(np.abs(gradient).max() > 0 for gradient in kept)
