"""The text a model writes for its own tuning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import write_checkpoint

from mbq_export.checkpoint import Checkpoint, load, locate
from mbq_export.slicing import own_text
from mbq_export.store import Store

CONTEXT = 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load(locate(str(write_checkpoint(tmp_path_factory.mktemp("own") / "model", "llama"))))


@pytest.fixture
def windows(checkpoint: Checkpoint) -> np.ndarray:
    return np.random.default_rng(0).integers(0, checkpoint.decoder.vocab_size, (5, CONTEXT))


def written(checkpoint: Checkpoint, windows: np.ndarray, seed: int = 0, store: Store | None = None) -> np.ndarray:
    told: list[tuple[int, int]] = []
    found = own_text.write(
        checkpoint, windows, 7, seed, store or Store(None), lambda done, all_: told.append((done, all_))
    )
    assert told[-1] == (7, 7)
    return found


def test_windows_begin_as_the_text_does_and_the_rest_is_sampled(
    checkpoint: Checkpoint, windows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_text, "_TOGETHER", 3)  # three rounds, the last one short
    state = torch.random.get_rng_state()
    found = written(checkpoint, windows)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert found.shape == (7, CONTEXT)
    assert found.dtype == np.int64
    assert ((found >= 0) & (found < checkpoint.decoder.vocab_size)).all()
    prompt = own_text._PROMPT_TOKENS
    known = {tuple(row[i : i + prompt]) for row in windows for i in range(CONTEXT - prompt + 1)}
    assert all(tuple(row[:prompt]) in known for row in found)
    # A random model's distribution is broad: no continuation is another's, and none is the likeliest one throughout.
    assert len({tuple(row[prompt:]) for row in found}) == 7
    with torch.no_grad():
        likeliest = checkpoint.model(torch.from_numpy(found[:, :-1])).logits.argmax(-1).numpy()
    assert 0 < (likeliest[:, prompt - 1 :] == found[:, prompt:]).mean() < 0.9


def test_the_seed_decides_and_a_store_spares_the_work(
    checkpoint: Checkpoint, windows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_text, "_TOGETHER", 4)
    store = Store(tmp_path / "store", "inputs")
    first = written(checkpoint, windows, store=store)
    np.testing.assert_array_equal(first, written(checkpoint, windows))
    assert (first != written(checkpoint, windows, seed=1)).any()
    monkeypatch.setattr(own_text, "_continued", None)
    np.testing.assert_array_equal(first, written(checkpoint, windows, store=Store(tmp_path / "store", "inputs")))
