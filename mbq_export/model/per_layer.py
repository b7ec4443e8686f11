"""Per-layer embeddings, as Gemma 4 E2B and E4B have them: a table beside the embedding, with a part for each block.

A block gates its part of a token's row, and adds it to the residual stream (``format.per_layer``)::

    given  = norm(embedding of the token @ rows of per_layer_model_projection) + part of the row
    branch = norm(projection @ (activation(gate @ stream) * given))

The checkpoint has the projections of all blocks in one matrix.  ``divide`` gives each block its rows as a linear layer
of its own.  So a block is worked on by itself, and what it is given is computed when it is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import functional

from .shape import Decoder

NORM = "model.per_layer_projection_norm"
"""The name of the norm of what the embedding of a token gives to a block."""


class _OfAllBlocks(torch.nn.Module):
    """The projections of all blocks, one beside the other."""

    def __init__(self, layers: Iterable[torch.nn.Module]) -> None:
        super().__init__()
        # In a list, they do not become parts of this module.
        self._layers: list[Any] = [*layers]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer.per_layer_model_projection(x) for layer in self._layers], -1)


def divide(model: Any, decoder: Decoder) -> None:
    """Give each block its rows of the projection, and fold the scales of a loaded model, in place.

    The model computes the same.  It multiplies the projection's output by a constant, and by ``sqrt(1 / 2)`` the sum
    with the table's row.  The first is folded into the projection, the second into its norm and the factor of rows.

    Args:
        model: transformers' model, in float32.
        decoder: its description, with per-layer embeddings.
    """
    inner, size = model.model, decoder.per_layer_size
    with torch.no_grad():
        whole = inner.per_layer_model_projection.weight
        whole.mul_(inner.per_layer_model_projection_scale)
        inner.per_layer_projection_norm.weight.mul_(inner.per_layer_input_scale)
        inner.embed_tokens_per_layer.embed_scale.fill_(decoder.per_layer_scale)
    inner.per_layer_model_projection_scale = inner.per_layer_input_scale = 1.0
    for index, layer in enumerate(inner.layers):
        linear = torch.nn.Linear(whole.shape[1], size, bias=False, device="meta")
        linear.weight = torch.nn.Parameter(whole.detach()[index * size : (index + 1) * size], requires_grad=False)
        layer.per_layer_model_projection = linear
    inner.per_layer_model_projection = _OfAllBlocks(inner.layers)


def given(model: Any, layer: int, tokens: torch.Tensor) -> torch.Tensor:
    """What the tokens give to one block.

    Args:
        model: transformers' model, after ``divide``.
        layer: index of the block.
        tokens: int64 [1, context].

    Returns:
        [1, context, size].
    """
    inner = model.model
    table, block = inner.embed_tokens_per_layer, inner.layers[layer]
    size = table.weight.shape[1] // len(inner.layers)
    rows = functional.embedding(tokens, table.weight)[..., layer * size : (layer + 1) * size] * table.embed_scale
    projected = block.per_layer_model_projection(inner.embed_tokens(tokens))
    summed: torch.Tensor = inner.per_layer_projection_norm(projected) + rows
    return summed


def beside_embedding(model: Any, decoder: Decoder, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the model takes besides the embeddings of tokens, where it is given these in place of the tokens.

    Args:
        model: transformers' model.
        decoder: its description.
        tokens: int64 [1, context].
    """
    if not decoder.per_layer_size:
        return {}
    return {"per_layer_inputs": model.model.get_per_layer_inputs(tokens)}
