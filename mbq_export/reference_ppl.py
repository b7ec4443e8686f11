"""The full-precision model's loss on given windows: what a bundle's perplexity is held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .model.checkpoint import load, locate


def window_nll(
    model: str, token_windows: Sequence[Sequence[int]], progress: Callable[[int, int], None] | None = None
) -> list[float]:
    """Mean negative log-likelihood (nats per predicted token) of each window under the float32 model.

    model: as ``mbq-export --model`` takes it.  Raises ModelError.
    """
    checkpoint = load(locate(model))
    losses = []
    with torch.no_grad():
        for i, window in enumerate(token_windows):
            ids = torch.tensor([list(window)])
            losses.append(float(checkpoint.model(ids, labels=ids, use_cache=False).loss))
            if progress is not None:
                progress(i + 1, len(token_windows))
    return losses
