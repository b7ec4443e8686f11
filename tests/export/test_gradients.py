"""Labels that are drawn from a model's predictions."""

from __future__ import annotations

import pytest
import torch

from mbq_export.model.gradients import drawn

ROWS = 20_000


@pytest.mark.parametrize("probabilities", [[0.5, 0.0, 0.3, 0.2], [0.0, 1.0], [0.0, 0.25, 0.75, 0.0]])
def test_labels_are_drawn_as_often_as_they_are_likely(probabilities: list[float]) -> None:
    expected = torch.tensor(probabilities)
    labels = drawn(expected.expand(ROWS, -1), torch.Generator().manual_seed(0))
    counts = labels.bincount(minlength=len(expected))
    assert not counts[expected == 0].any()
    allowed = 5 * (expected * (1 - expected) / ROWS).sqrt()
    assert ((counts / ROWS - expected).abs() <= allowed).all()


def test_the_same_seed_gives_the_same_labels() -> None:
    probabilities = torch.rand(64, 1000).softmax(-1)
    first, again, other = (drawn(probabilities, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
