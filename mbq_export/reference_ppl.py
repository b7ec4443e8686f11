"""The full-precision model's loss on given windows, which a bundle's perplexity is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .model.loading import load
from .model.source import locate


def window_nll(
    model: str, token_windows: Sequence[Sequence[int]], progress: Callable[[int, int], None] | None = None
) -> list[float]:
    """The loss of each window under the float32 model.

    Args:
        model: as ``mbq-export --model`` takes it.
        token_windows: token ids of each window.
        progress: called with the number of windows that are done, and of all windows.

    Returns:
        Mean negative log-likelihood of each window, in nats per predicted token.

    Raises:
        ModelError: the model cannot be loaded.
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
