"""The full-precision model's logits on given windows, which a bundle is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from .model.loading import load
from .model.source import locate


def load_logits(model: str) -> Callable[[Sequence[int]], NDArray[np.float32]]:
    """Load a float32 model.

    Args:
        model: as ``mbq-export --model`` takes it.

    Returns:
        A function from token ids [S] to logits of every token, float32 [S, vocab].

    Raises:
        ModelError: the model cannot be loaded.
    """
    checkpoint = load(locate(model))

    def logits(tokens: Sequence[int]) -> NDArray[np.float32]:
        with torch.no_grad():
            found = checkpoint.model(torch.tensor([list(tokens)], device=checkpoint.device), use_cache=False).logits[0]
        return np.asarray(found.float().cpu().numpy(), np.float32)

    return logits
