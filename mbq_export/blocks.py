"""A decoder run block by block, with all windows going through one block before the next is touched.

Only the block at hand needs its weights in fast memory, and what comes before it may already be sliced.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .checkpoint import Checkpoint
from .families import Unit

Hidden = torch.Tensor
"""float32 [1, context, hidden_size]: one window's residual stream."""


class Blocks:
    """The blocks of a checkpoint's model for windows of ``context`` tokens, all of the same length."""

    def __init__(self, checkpoint: Checkpoint, context: int) -> None:
        self.checkpoint = checkpoint
        self.layers = checkpoint.model.model.layers
        self._arguments = self._observed_arguments(context)

    def _observed_arguments(self, context: int) -> list[dict[str, Any]]:
        """What the model hands to each block besides the residual stream: masks, positions, rotations."""
        seen: list[dict[str, Any]] = []

        def note(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(kwargs)

        handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in self.layers]
        try:
            with torch.no_grad():
                self.checkpoint.model.model(torch.zeros(1, context, dtype=torch.long), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def embed(self, windows: NDArray[np.int64]) -> list[Hidden]:
        """int64 [windows, context] tokens -> the residual stream in front of the first block."""
        with torch.no_grad():
            return [self.checkpoint.model.get_input_embeddings()(torch.from_numpy(w)[None]) for w in windows]

    def run(self, layer: int, hidden: Hidden) -> Hidden:
        """One window through block ``layer``."""
        with torch.no_grad():
            output: Hidden = self.layers[layer](hidden, **self._arguments[layer])
        return output

    def final(self, hidden: Hidden) -> torch.Tensor:
        """float32 [context, hidden_size]: the head's input."""
        with torch.no_grad():
            normed: torch.Tensor = self.checkpoint.model.model.norm(hidden)[0]
        return normed


@contextmanager
def replaced(checkpoint: Checkpoint, unit: Unit, modules: list[torch.nn.Module]) -> Iterator[None]:
    """The unit's layers, in order, stand aside for ``modules`` while the block runs."""
    places = []
    try:
        for name, module in zip(unit.sources, modules, strict=True):
            parent_name, _, attribute = name.rpartition(".")
            parent = checkpoint.model.get_submodule(parent_name)
            places.append((parent, attribute, getattr(parent, attribute)))
            setattr(parent, attribute, module)
        yield
    finally:
        for parent, attribute, old in places:
            setattr(parent, attribute, old)
