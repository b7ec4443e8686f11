"""How much each token counts in a layer: by what an error of the layer's output there would cost the model.

The loss a small error ``d`` of a layer's output adds for a token is about ``0.5 * (g . d)**2``, with ``g`` the
gradient by that output; on average over directions it goes with the mean square of ``g``.  Inputs weighted so make
the layer's error, ``dW H dW.T``, one of the model's loss (GuidedQuant, arXiv 2505.07004, with one group of rows a
layer).  A few tokens of great gradient would outweigh all others, and with them what few tokens can tell; so weights
are cut at ``MAX_WEIGHT`` times the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import processes
from ..model.blocks import fast, lean_backward, require_finite
from ..model.checkpoint import Checkpoint
from ..store import Store

MAX_WEIGHT = 4.0

Importance = dict[str, NDArray[np.float32]]
"""float32 [windows, context] by layer, of mean 1."""

_STEP = "importance"


def backpropagate_samples(checkpoint: Checkpoint, window: NDArray[np.int64], generator: torch.Generator) -> None:
    """Run int64 [context] tokens forward and backward, for hooks to see.

    The loss is on labels drawn from the model's own predictions, which makes squares of gradients the Fisher
    information and not an error of fit.
    """
    # Only the embedding's output needs a gradient: no weight does.
    embedding = checkpoint.model.get_input_embeddings()
    embedded = embedding(checkpoint.on_device(window)[None]).detach().requires_grad_()
    logits = checkpoint.model(inputs_embeds=embedded, use_cache=False).logits[0].float()
    with torch.no_grad():
        # Drawn on the processor: the same seed gives the same labels on every device.
        labels = torch.multinomial(torch.softmax(logits, -1).cpu(), 1, generator=generator)[:, 0]
    torch.nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="sum").backward()


def token_importance(
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    seed: int,
    store: Store,
    progress: Callable[[int, int], None],
) -> Importance:
    """Weights of the tokens of int64 [windows, context], for every routed layer of the original model.

    Taken from ``store`` when it holds them.  Raises ModelError for gradients that are not finite.
    """
    kept = store.arrays(_STEP)
    if kept is not None:
        return {name: weights.astype(np.float32) for name, weights in kept.items()}
    # Made before any pass: what stays would otherwise lie between what goes, and hold its memory from the system.
    squares = {
        name: torch.zeros(windows.shape, device=checkpoint.device)
        for unit in checkpoint.decoder.units()
        for name in unit.sources
    }

    def hook(name: str) -> Callable[..., None]:
        def see_gradient(gradient: torch.Tensor) -> None:
            squares[name][at] = gradient.detach().float().square().reshape(-1, gradient.shape[-1]).mean(1)

        def forward(_: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
            output.register_hook(see_gradient)

        return forward

    generator = torch.Generator().manual_seed(seed + processes.index())
    own = range(len(windows))[processes.share(len(windows))]
    with ExitStack() as hooks:
        hooks.enter_context(lean_backward(checkpoint))
        for name in squares:
            hooks.enter_context(checkpoint.linear(name).register_forward_hook(hook(name)))
        for done, at in enumerate(own, 1):
            with fast(checkpoint.device):
                backpropagate_samples(checkpoint, windows[at], generator)
            progress(done, len(own))
    importance = {name: _weights(name, processes.summed(of_layer)) for name, of_layer in squares.items()}
    store.put_arrays(_STEP, importance)
    return importance


def _weights(name: str, squares: torch.Tensor) -> NDArray[np.float32]:
    require_finite(name, squares)
    mean = squares.mean()
    if mean == 0:  # a layer without influence: all tokens are alike
        return np.ones(squares.shape, np.float32)
    weights = (squares / mean).clamp(max=MAX_WEIGHT)
    return np.asarray((weights / weights.mean()).cpu().numpy())
