"""Rotations do not change what a model computes, and they spread outlier channels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import write_checkpoint

from mbq_export.model.loading import load
from mbq_export.model.source import locate
from mbq_export.transforms.rotation import Rotation, rotate

TOKENS = torch.tensor([np.random.default_rng(1).integers(0, 256, 40).tolist()])


@pytest.mark.parametrize("n", [2, 7, 64, 96, 192, 576, 1536, 2048])
def test_a_rotation_is_orthogonal_and_its_factors_are_the_matrix(n: int) -> None:
    rotation = Rotation.random(n, seed=3)
    matrix = rotation.matrix
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), atol=1e-12, rtol=0)
    weight = torch.randn(5, n, dtype=torch.float64)
    torch.testing.assert_close(rotation.columns(weight), weight @ matrix)
    torch.testing.assert_close(rotation.rows(weight.T), matrix.T @ weight.T)
    torch.testing.assert_close(rotation.rows(weight[0]), matrix.T @ weight[0])


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "qwen3", "phi3", "phi3-longrope", "granite", "lfm2", "qwen3_5_text"]
)
def test_a_rotated_model_computes_the_same(name: str, tmp_path: Path) -> None:
    checkpoint = load(locate(str(write_checkpoint(tmp_path / name, name))))
    with torch.no_grad():
        before = checkpoint.model(TOKENS).logits
        weight = checkpoint.linear("lm_head").weight.clone()
        head_input = rotate(checkpoint, seed=0)
        after = checkpoint.model(TOKENS).logits
    torch.testing.assert_close(after, before, atol=1e-4 * float(before.abs().max()), rtol=0)
    assert (head_input is not None) == checkpoint.decoder.tied
    # The weights did rotate.
    assert (checkpoint.linear("lm_head").weight - weight).abs().max() > 0.1 * weight.abs().max()


def test_a_channel_that_stands_out_is_spread() -> None:
    weight = torch.full((8, 576), 0.01, dtype=torch.float64)
    weight[:, 17] = 1.0
    spread = Rotation.random(576, seed=0).columns(weight)
    assert float(spread.abs().max()) < 0.15
