"""Folds a model's multipliers into its weights, so that neither calibration nor an engine has to know them.

Granite multiplies what attention and MLP put out, the logits, and the rows of the embedding.  The first is a factor of
the linear layers that put it out, the second of the final norm.  The third stays a factor of the rows that are looked
up (``Decoder.embedding_scale``): a head that is the embedding must not have it.

Some blocks of the larger Gemma 4 have no layer for values: values are the keys before their norm.  Such a block gets a
layer of values with the weights of the keys, and is then sliced and lowered as any other block.

What scores the experts of Gemma 4 has a norm of its own, and each expert has a factor.  Here it reads what the experts
read, and the factors are those of the experts' last layers.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from mbq_runtime.errors import ModelError

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
    for layer in range(decoder.layers):
        if len(decoder.readers(layer)) < len(decoder.branches(layer)):
            _fold_router(model.get_submodule(decoder.block(layer)), decoder, layer)
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


def _fold_router(block: Any, decoder: Decoder, layer: int) -> None:
    """Let a block's router read what its experts read, without factors."""
    router, norm = block.router, block.pre_feedforward_layernorm_2
    if not norm.weight.all():
        raise ModelError(
            f"block {layer}: pre_feedforward_layernorm_2 is 0 in some channels, and what scores experts reads them; "
            "such a model has no lowering: report it"
        )
    with torch.no_grad():
        router.proj.weight.mul_(router.scale * router.scalar_root_size / norm.weight)
        for name, factor in zip(decoder.expert_layers(layer)[2], router.per_expert_scale.tolist(), strict=True):
            block.get_submodule(name.removeprefix(f"{decoder.block(layer)}.")).weight.mul_(factor)
        router.scale.fill_(1)
        router.per_expert_scale.fill_(1)
    router.norm, router.scalar_root_size = norm, 1.0
