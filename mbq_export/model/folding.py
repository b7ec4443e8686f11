"""Folds a model's multipliers into its weights, so that neither calibration nor an engine has to know them.

Granite multiplies what attention and MLP put out, the logits, and the rows of the embedding.  The first is a factor of
the linear layers that put it out, the second of the final norm.  The third stays a factor of the rows that are looked
up (``Decoder.embedding_scale``): a head that is the embedding must not have it.

Some blocks of the larger Gemma 4 have no layer for values: values are the keys before their norm.  Such a block gets a
layer of values with the weights of the keys, and is then sliced and lowered as any other block.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from .per_layer import divide
from .shape import Decoder


def fold(model: Any, decoder: Decoder) -> None:
    """Fold the multipliers of a loaded model in place.  The model computes the same.

    Args:
        model: transformers' model, in float32.
        decoder: its description.
    """
    if decoder.per_layer_size:
        divide(model, decoder)
    if decoder.family.value_norms:
        _add_values(model)
    with torch.no_grad():
        if decoder.branch_scale != 1:
            for layer in range(decoder.layers):
                units = decoder.layer_units(layer)
                for name in [name for role in units if role.endswith("_out") for name in units[role].sources]:
                    for parameter in model.get_submodule(name).parameters():
                        parameter.mul_(decoder.branch_scale)
                model.get_submodule(decoder.block(layer)).residual_multiplier = 1.0
        if decoder.logits_scale != 1:
            model.get_submodule(decoder.final_norm).weight.mul_(decoder.logits_scale)
            model.config.logits_scaling = 1.0
    if hasattr(model.model, "embedding_multiplier"):
        model.model.embedding_multiplier = 1.0
        scale = decoder.embedding_scale
        model.get_input_embeddings().register_forward_hook(lambda module, args, rows: rows * scale)


def _add_values(model: Any) -> None:
    """Give a layer of values to each block whose values are its keys."""
    for block in model.model.layers:
        attention = block.self_attn
        # A block that shares the values of an earlier one has no such name.
        if getattr(attention, "v_proj", attention) is None:
            attention.v_proj = copy.deepcopy(attention.k_proj)
