"""What the experts of a block read of the calibration text, and the second moments of it, one expert at a time.

The second moments of all experts of a block would take more memory than their weights.  So the inputs are kept, of
which a token has as many as it takes experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from .. import processes
from ..model.blocks import fast_dtype, fast_products, require_finite, watching_inputs
from ..model.checkpoint import Checkpoint
from .importance import Importance

FEWEST_TOKENS = 32
"""An expert that sees fewer tokens than this has no second moments to speak of."""


def add_weighted_square(total: torch.Tensor, x: torch.Tensor, weights: NDArray[np.float32]) -> None:
    """Add the sum of ``weight * x x.T`` over tokens.

    Args:
        total: float32 [K, K], added to.
        x: [tokens, K].
        weights: float32 [tokens].
    """
    weighted = x.float() * torch.from_numpy(weights).to(x.device).sqrt()[:, None]
    with fast_products(x.device):
        total.addmm_(weighted.T, weighted)


class ExpertInputs:
    """The inputs of the experts of one block.

    window: the index of the window that runs, among this process's own.
    rare: experts with fewer than FEWEST_TOKENS, once ``hessians`` was called.

    Args:
        checkpoint: the model.
        layer: index of the block; one without experts has no inputs.
        importance: weights of tokens by layer.
        windows: this process's own windows.
    """

    window = 0
    rare = 0

    def __init__(self, checkpoint: Checkpoint, layer: int, importance: Importance, windows: slice) -> None:
        self._checkpoint, self._importance, self._windows = checkpoint, importance, windows
        self._names: list[tuple[str, ...]] = []
        if "experts" in checkpoint.decoder.branches(layer):
            gate, up, down = checkpoint.decoder.expert_layers(layer)
            self._names = [*zip(gate, up, strict=True), *((name,) for name in down)]
        # By the first of the layers that share an input: window, tokens and their rows.
        self._seen: dict[str, list[tuple[int, NDArray[np.int64], torch.Tensor]]] = {
            names[0]: [] for names in self._names
        }

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the inputs of all experts while the block runs."""
        dtype = fast_dtype(self._checkpoint.device)

        def keep(name: str, x: torch.Tensor) -> None:
            tokens = self._checkpoint.tokens_of(name)
            assert tokens is not None
            self._seen[name].append((self.window, tokens.cpu().numpy(), x.to(dtype)))

        with watching_inputs(self._checkpoint, {name: name for name in self._seen}, keep):
            yield

    def hessians(self, tokens: int) -> dict[str, Callable[[], torch.Tensor]]:
        """By layer, what makes the second moments of its inputs, float32 [K, K].

        An expert that few tokens chose gets those of inputs without any covariance.  Then error feedback rounds each
        weight by itself.

        Args:
            tokens: of all windows of all processes.

        Raises:
            ModelError: an input is not finite.
        """
        counts = [sum(len(rows) for _, rows, _ in self._seen[names[0]]) for names in self._names]
        counts = processes.summed(torch.tensor(counts, dtype=torch.int64)).tolist()
        found: dict[str, Callable[[], torch.Tensor]] = {}
        for names, count in zip(self._names, counts, strict=True):
            for name in names:
                found[name] = partial(self._hessian, name, names[0], tokens if count >= FEWEST_TOKENS else 0)
        experts = len(self._names) // 2
        self.rare = sum(count < FEWEST_TOKENS for count in counts[:experts])
        return found

    def _hessian(self, name: str, shared: str, tokens: int) -> torch.Tensor:
        """tokens: 0 for an input without covariance."""
        linear = self._checkpoint.linear(name)
        if not tokens:
            return torch.eye(linear.in_features, device=self._checkpoint.device)
        total = torch.zeros(linear.in_features, linear.in_features, device=self._checkpoint.device)
        weights = self._importance[name][self._windows]
        for window, rows, x in self._seen[shared]:
            add_weighted_square(total, x, weights[window][rows])
        require_finite(name, processes.summed(total))
        return total.div_(tokens)
