"""Token weights: how much each token counts in a layer.

A small error ``d`` of a layer's output adds about ``0.5 * (g . d)**2`` to a token's loss, with ``g`` the gradient by
that output.  Averaged over directions this goes with the mean square of ``g``.  With inputs weighted so, the layer's
error ``dW H dW.T`` becomes an error of the model's loss (GuidedQuant, arXiv 2505.07004, with one group of rows a
layer).  A few tokens of large gradient would outweigh all others, so weights are cut at ``MAX_WEIGHT`` times the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import processes
from ..context import Calibration
from ..model.blocks import fast_autocast, require_finite
from ..model.checkpoint import Checkpoint
from ..model.gradients import backpropagate_samples, lean_backward

MAX_WEIGHT = 4.0
"""Largest weight of a token, in mean weights."""

Importance = dict[str, NDArray[np.float32]]
"""Token weights by layer: float32 [windows, context], of mean 1 over the tokens that the layer sees."""

_STEP = "token weights"


def alike(checkpoint: Checkpoint, windows: NDArray[np.int64]) -> Importance:
    """The same weight for every token, for every routed layer.

    Args:
        checkpoint: the model.
        windows: int64 [windows, context] tokens.
    """
    ones = np.ones(windows.shape, np.float32)
    return {name: ones for unit in checkpoint.decoder.units() for name in unit.sources}


def token_importance(calibration: Calibration, windows: NDArray[np.int64]) -> Importance:
    """Weights of tokens, for every routed layer of the original model.

    Args:
        calibration: the context.  Weights that its store holds are not computed again.
        windows: int64 [windows, context] tokens.

    Raises:
        ModelError: a gradient is not finite.
    """
    progress = calibration.stage("computing token weights")
    kept = calibration.store.arrays(_STEP)
    if kept is not None:
        return {name: weights.astype(np.float32) for name, weights in kept.items()}
    checkpoint = calibration.checkpoint
    # Allocate long-lived buffers first. Otherwise they are scattered between temporary ones and the heap cannot shrink.
    squares = {
        name: torch.zeros(windows.shape, device=checkpoint.device)
        for unit in checkpoint.decoder.units()
        for name in unit.sources
    }

    def hook(name: str) -> Callable[..., None]:
        def forward(_: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
            of_expert = checkpoint.tokens_of(name)
            tokens = slice(None) if of_expert is None else of_expert

            def see_gradient(gradient: torch.Tensor) -> None:
                squares[name][at, tokens] = gradient.detach().float().square().reshape(-1, gradient.shape[-1]).mean(1)

            output.register_hook(see_gradient)

        return forward

    generator = torch.Generator().manual_seed(calibration.seed + processes.index())
    own = range(len(windows))[processes.share(len(windows))]
    with ExitStack() as hooks:
        hooks.enter_context(lean_backward(checkpoint))
        for name in squares:
            hooks.enter_context(checkpoint.linear(name).register_forward_hook(hook(name)))
        for done, at in enumerate(own, 1):
            with fast_autocast(checkpoint.device):
                backpropagate_samples(checkpoint, windows[at], generator)
            progress(done, len(own))
    importance = {}
    for unit in checkpoint.decoder.units():
        for name in unit.sources:
            importance[name] = _weights(name, processes.summed(squares.pop(name)), some=unit.experts is not None)
    calibration.store.put_arrays(_STEP, importance)
    return importance


def _weights(name: str, squares: torch.Tensor, *, some: bool) -> NDArray[np.float32]:
    """some: whether the layer is of an expert, which sees some tokens.  The mean is that of these."""
    require_finite(name, squares)
    seen = squares != 0 if some else slice(None)
    mean = squares[seen].mean()
    if not mean > 0:  # a layer without influence, or an expert that saw nothing: all tokens count alike
        return np.ones(squares.shape, np.float32)
    weights = (squares / mean).clamp(max=MAX_WEIGHT)
    return np.asarray((weights / weights[seen].mean()).cpu().numpy())
