"""The order of budgets, the phases of methods, and the divergence with its gradient against torch's own."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch.nn import functional

from mbq_export.methods import (
    TUNE_BASE_SLICE,
    TUNE_GAINS,
    TUNE_ROUTED,
    TUNE_SCALES,
    TUNE_SCALES_LONG,
    tuned_bits,
    tunings,
)
from mbq_export.tuning import teacher, tune
from mbq_runtime.bundle.slice_profile import SliceProfile


class StandIn:
    """A teacher whose log probabilities are its inputs'."""

    def log_probabilities(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.log_softmax(-1)


def test_half_of_the_steps_are_at_one_depth_or_all_are() -> None:
    profile = SliceProfile((2, 2, 2, 2))
    once, long, first, second = (
        list(islice(tune.budget_order(profile, phase), 12))
        for phase in (TUNE_SCALES, TUNE_SCALES_LONG, TUNE_BASE_SLICE, TUNE_ROUTED)
    )
    assert once == long == [2, 4] * 6
    assert first == [2] * 12
    assert second == [2.5, 4, 3, 2, 3.5, 4, 2.5, 2, 3, 4, 3.5, 2]
    assert list(islice(tune.budget_order(SliceProfile((2, 6)), TUNE_SCALES), 3)) == [2, 2, 2]


def test_a_base_slice_of_two_bits_is_tuned_by_itself_first() -> None:
    two, three = SliceProfile((2, 2, 2, 2)), SliceProfile((3, 1, 2, 2))
    assert tunings("learned", two, None) == {TUNE_BASE_SLICE: 250, TUNE_ROUTED: 250}
    assert tunings("learned", two, 7) == {TUNE_BASE_SLICE: 4, TUNE_ROUTED: 3}
    assert tunings("learned", two, 1) == {TUNE_SCALES_LONG: 1}
    assert tunings("learned", three, None) == {TUNE_SCALES_LONG: 1100}
    assert tunings("nested", two, None) == {TUNE_SCALES: 80}
    assert tunings("nested", three, None) == {TUNE_GAINS: 40}
    assert tunings("nested", two, 0) == tunings("rtn", two, None) == {}


def test_depths_of_more_than_four_bits_are_not_tuned() -> None:
    assert [tuned_bits(SliceProfile(slices)) for slices in ((2, 2, 2, 2), (3, 1, 2, 2), (3, 2, 3), (4, 4), (8,))] == [
        4, 4, 3, 4, 0,
    ]  # fmt: skip
    assert tunings("learned", SliceProfile((6, 2)), None) == {}


def test_the_divergence_and_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "TOKENS_AT_ONCE", 3)
    generator = torch.Generator().manual_seed(0)
    targets, student = (torch.randn(10, 50, generator=generator) for _ in range(2))
    values, gradients = [], []
    for divergence in (
        lambda logits: teacher.divergence(logits, StandIn(), targets),
        lambda logits: functional.kl_div(
            logits.log_softmax(-1), targets.log_softmax(-1), log_target=True, reduction="batchmean"
        ),
    ):
        logits = student.clone().requires_grad_()
        value = divergence(logits)
        (3 * value).backward()
        values.append(float(value.detach()))
        gradients.append(logits.grad)
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
