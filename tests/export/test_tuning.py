"""What the tuning derives by hand against what torch derives by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from mbq_export.slicing import tuning
from mbq_export.slicing.reference import Sliced, decode
from mbq_runtime.profile import SliceProfile

PROFILE = SliceProfile((3, 1, 2, 2))


class StandIn:
    """A teacher whose log probabilities are its inputs'."""

    def log_probabilities(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.log_softmax(-1)


def test_the_divergence_and_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_TOKENS_AT_ONCE", 3)
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(10, 50, generator=generator) for _ in range(2))
    values, gradients = [], []
    for divergence in (
        lambda logits: tuning._Divergence.apply(logits, StandIn(), teacher),
        lambda logits: functional.kl_div(
            logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean"
        ),
    ):
        logits = student.clone().requires_grad_()
        value = divergence(logits)
        (3 * value).backward()
        values.append(float(value.detach()))
        gradients.append(logits.grad)
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> tuple[Sliced, Any]:
    monkeypatch.setattr(tuning, "_WEIGHTS_AT_ONCE", 5 * 128)  # several pieces, the last one short
    rng = np.random.default_rng(0)
    sliced = Sliced(
        rng.integers(0, 256, (12, 128)).astype(np.uint8),
        rng.uniform(0.5, 1, (12, 2)).astype(np.float16),
        rng.normal(size=(12, 2)).astype(np.float16),
    )
    return sliced, tuning._Tuned(sliced, None)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_untouched_a_layer_is_its_slices(layer: tuple[Sliced, Any], depth: int) -> None:
    sliced, tuned = layer
    weight = tuned.weight_at(PROFILE.depth_bits[depth - 1])
    np.testing.assert_allclose(weight.detach().numpy(), decode(sliced, PROFILE, depth), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", PROFILE.depth_bits)
def test_gradients_of_scale_and_offset(layer: tuple[Sliced, Any], bits: int) -> None:
    _, tuned = layer
    x = torch.randn(7, 128, generator=torch.Generator().manual_seed(1))
    tuned.bits = bits
    tuned(x).square().sum().backward()
    by_hand = tuned.scale_change.grad.clone(), tuned.offset_change.grad.clone()
    tuned.zero_grad()
    cells = (tuned.codes >> (8 - bits)).view(12, 2, 64).float()
    weight = tuned.scale[:, :, None] * 2.0 ** (2 - bits) * (cells + 0.5) + tuned.offset[:, :, None]
    functional.linear(x, weight.view(12, 128)).square().sum().backward()
    for found, expected in zip(by_hand, (tuned.scale_change.grad, tuned.offset_change.grad), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
