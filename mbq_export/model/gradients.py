"""Backward passes through a decoder: of samples from its own predictions, and with little memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.checkpoint import checkpoint as recomputed

from ..memory import KEPT_ACTIVATION_BYTES, activation_bytes
from .blocks import replaced_forward
from .checkpoint import Checkpoint
from .per_layer import beside_embedding


def backpropagate_samples(checkpoint: Checkpoint, window: NDArray[np.int64], generator: torch.Generator) -> None:
    """Run one window forward and backward, so that hooks see activations and gradients.

    The loss is on labels drawn from the model's own predictions.  So the squares of gradients are the Fisher
    information, and not an error of fit.

    Args:
        checkpoint: the model.
        window: int64 [context] tokens.
        generator: draws the labels, on the processor.
    """
    # Only the embedding's output needs a gradient: no weight does.
    embedding, tokens = checkpoint.model.get_input_embeddings(), checkpoint.on_device(window)[None]
    embedded = embedding(tokens).detach().requires_grad_()
    beside = beside_embedding(checkpoint.model, checkpoint.decoder, tokens)
    logits = checkpoint.model(inputs_embeds=embedded, use_cache=False, **beside).logits[0]
    with torch.no_grad():
        probabilities = logits.float().softmax(-1)
        labels = drawn(probabilities.cpu(), generator).to(logits.device)
        # The gradient of the cross-entropy, summed over tokens.
        probabilities[torch.arange(len(labels), device=logits.device), labels] -= 1
    logits.backward(probabilities.to(logits.dtype))


def drawn(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One label for each row, drawn with one random number.  ``torch.multinomial`` takes one for each column.

    Args:
        probabilities: float32 [rows, columns], on the processor: the same seed gives the same labels on every device.
        generator: draws the random numbers.

    Returns:
        int64 [rows].
    """
    upto = probabilities.cumsum(-1)
    at = torch.rand(len(upto), 1, generator=generator) * upto[:, -1:]
    return torch.searchsorted(upto, at, right=True)[:, 0].clamp_max(upto.shape[1] - 1)


@contextmanager
def lean_backward(checkpoint: Checkpoint) -> Iterator[None]:
    """Bound the memory of backward passes while the block runs.

    Where a window's activations would take more than ``KEPT_ACTIVATION_BYTES``, a decoder block keeps only its input,
    and the backward pass computes the block again.

    Args:
        checkpoint: the model whose blocks are changed.
    """
    with ExitStack() as stack:
        if activation_bytes(checkpoint.decoder) > KEPT_ACTIVATION_BYTES:
            for layer in checkpoint.model.model.layers:
                # Nothing in a block is random.
                again = partial(recomputed, layer.forward, use_reentrant=False, preserve_rng_state=False)
                stack.enter_context(replaced_forward(layer, again))
        yield
