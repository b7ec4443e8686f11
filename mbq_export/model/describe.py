"""The description of a model, made from its config."""

from __future__ import annotations

import math
from typing import Any

from mbq_runtime.bundle.facts import BlockHeads
from mbq_runtime.errors import ModelError
from mbq_targets.spec import DeltaNet, Experts

from .config_keys import ConfigKeys
from .families import Family, check_family
from .shape import CONV, DELTA, FULL, SLIDING, Decoder, QueryGrowth

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""The activation function of the gate, by its name in config.json."""

_SUM_EPS = 1e-6
"""What transformers' LFM2-MoE adds to a sum of weights before it divides by it."""

HEAD_DIM_STEP = 16
"""ONNX Runtime's attention with rotation needs a head size that is a multiple of this on a CPU, and so do delta nets
of TVM."""


def describe(config: Any, where: str, *, tied: bool | None = None) -> Decoder:
    """The description of a model.

    Args:
        config: transformers' config of the model.
        where: the model's name, for errors.
        tied: whether the loaded model's head is its embedding.  None: what the config says.

    Raises:
        ModelError: the family, or a feature of the model, has no lowering.
    """
    family = check_family(config.model_type, getattr(config, "architectures", None), where)
    keys = ConfigKeys(config, family.without)
    decoder = _described(keys, family, where, tied)
    for key, value in keys.unread():
        raise ModelError(
            f"{where}: {key} is {value!r}; a {config.model_type} model of transformers reads it, and this exporter has "
            "no lowering for it: give a model that leaves it as it is by default"
        )
    return decoder


def _described(keys: ConfigKeys, family: Family, where: str, tied: bool | None) -> Decoder:
    activation = keys.get("hidden_act") or keys.get("hidden_activation") or family.activation
    if activation not in ACTIVATIONS:
        raise ModelError(f"{where}: hidden_act is {activation!r}; only {', '.join(ACTIVATIONS)} have a lowering")
    layers, heads = keys.get("num_hidden_layers"), keys.get("num_attention_heads")
    hidden = keys.get("hidden_size")
    head_dims = [size or hidden // heads for size in keys.by_layer("head_dim")]
    for head_dim in head_dims:
        if head_dim % HEAD_DIM_STEP:
            raise ModelError(
                f"{where}: head_dim is {head_dim}; the attention kernels need a multiple of {HEAD_DIM_STEP}"
            )
    window, kinds = _windows(keys, family, layers, where)
    block_heads = _block_heads(keys, kinds, head_dims, where)
    told_tied = bool(keys.get("tie_word_embeddings"))
    beta = keys.rope("llama_4_scaling_beta") if family.growing_queries else None
    # "vision": only tokens of an image look ahead.
    if (ahead := keys.get("use_bidirectional_attention")) not in (None, False, "vision"):
        raise ModelError(
            f"{where}: use_bidirectional_attention is {ahead!r}; tokens of text that look ahead have no lowering"
        )
    keys.get("attention_k_eq_v")  # ``folding.fold`` gives values a layer of their own
    ffn_size = _ffn_size(keys, family)
    return Decoder(
        family=family,
        layers=layers,
        hidden_size=hidden,
        ffn_size=ffn_size,
        heads=heads,
        kv_heads=keys.by_layer("num_key_value_heads")[0],
        head_dim=head_dims[0],
        vocab_size=keys.get("vocab_size"),
        context_length=_context_length(keys),
        norm_eps=keys.get(family.norm_eps),
        tied=told_tied if tied is None else tied,
        activation=ACTIVATIONS[activation],
        attention_scale=1.0 if family.scores_as_they_are else _attention_scale(keys, head_dims[0]),
        layer_kinds=kinds,
        sliding_window=window or keys.get("max_position_embeddings"),
        embedding_scale=math.sqrt(hidden) if family.scaled_embedding else float(keys.get("embedding_multiplier") or 1),
        rotates=_rotates(keys, family, window, kinds),
        attention_cap=(keys.get("attn_logit_softcapping") or None) if family.capped_scores else None,
        logits_cap=keys.get("final_logit_softcapping") or None,
        query_growth=QueryGrowth(beta, keys.rope("original_max_position_embeddings")) if beta else None,
        conv_taps=keys.get("conv_L_cache") or 0,
        delta=_delta_net(keys, activation, where) if DELTA in kinds else None,
        branch_scale=float(keys.get("residual_multiplier") or 1),
        logits_scale=1 / float(keys.get("logits_scaling") or 1),
        experts=_experts(keys, family, layers, where),
        block_heads=block_heads,
        ffn_sizes=_ffn_sizes(keys, block_heads, ffn_size),
        per_layer_size=_per_layer_size(keys, family, where),
        rotated=tuple(sorted(int(head_dims[0] * share) for share in keys.rotated_shares() if share < 1)),
    )


def _windows(keys: ConfigKeys, family: Family, layers: int, where: str) -> tuple[int | None, tuple[str, ...]]:
    """The sliding window, and the kind of each layer."""
    window = keys.get("sliding_window") if keys.get("use_sliding_window", True) else None
    kinds = keys.get("layer_types") or [SLIDING if window else FULL] * layers
    mixers = {kind for kind, role in ((CONV, "conv_in"), (DELTA, "delta_in")) if role in family.linears}
    unknown = set(kinds) - {FULL, SLIDING, *mixers}
    if unknown:
        raise ModelError(f"{where}: layers of kind {', '.join(sorted(unknown))} have no lowering")
    return window, tuple(kinds)


def _experts(keys: ConfigKeys, family: Family, layers: int, where: str) -> Experts | None:
    """The shape of the experts, or None where no block has some."""
    if family.experts is None:
        if keys.get("num_local_experts"):
            raise ModelError(f"{where}: num_local_experts is {keys.get('num_local_experts')}; experts have no lowering")
        return None
    without, every = keys.get("mlp_only_layers") or (), keys.get("decoder_sparse_step") or 1
    first = keys.get("num_dense_layers") or 0
    if not keys.get("enable_moe_block", True):
        first = layers
    sigmoid = family.experts.sigmoid
    found = Experts(
        count=keys.get("num_experts") or keys.get("num_local_experts") or 0,
        used=keys.get("num_experts_per_tok") or keys.get("top_k_experts") or 0,
        ffn_size=keys.get("moe_intermediate_size") or keys.get("intermediate_size"),
        blocks=tuple(first <= at and at not in without and (at + 1) % every == 0 for at in range(layers)),
        sigmoid=sigmoid,
        # Granite has no such key.  The softmax over the chosen experts alone is the softmax over all, normed.
        normed=bool(keys.get("norm_topk_prob", True)),
        sum_eps=_SUM_EPS if sigmoid else 0.0,
        scale=float(keys.get("routed_scaling_factor") or 1),
        biased=family.experts.bias is not None and bool(keys.get("use_expert_bias")),
    )
    if not found.count or not any(found.blocks):
        return None
    if not 1 <= found.used <= found.count:
        raise ModelError(f"{where}: a token takes {found.used} of {found.count} experts; needed: 1 to all of them")
    return found


def _block_heads(keys: ConfigKeys, kinds: tuple[str, ...], head_dims: list[int], where: str) -> tuple[BlockHeads, ...]:
    """Heads by block, where they differ or where the last blocks share keys and values; else nothing.

    A block that shares reads those of the last block of its kind that has its own.
    """
    kv_heads, shared = keys.by_layer("num_key_value_heads"), keys.get("num_kv_shared_layers") or 0
    own = list(kinds[: len(kinds) - shared])
    if missing := set(kinds[len(own) :]) - set(own):
        raise ModelError(
            f"{where}: num_kv_shared_layers is {shared}; then no layer of kind {', '.join(sorted(missing))} has keys "
            "and values"
        )
    if not shared and len(set(zip(kv_heads, head_dims, strict=True))) == 1:
        return ()
    last = {kind: layer for layer, kind in enumerate(own)}
    sources = [layer if layer < len(own) else last[kind] for layer, kind in enumerate(kinds)]
    return tuple(BlockHeads(*of) for of in zip(sources, kv_heads, head_dims, strict=True))


def _ffn_sizes(keys: ConfigKeys, block_heads: tuple[BlockHeads, ...], ffn_size: int) -> tuple[int, ...]:
    """The width of the MLP by block, where blocks that share keys and values have twice the width; else nothing."""
    if not keys.get("use_double_wide_mlp"):
        return ()
    return tuple(ffn_size * (1 if heads.source == layer else 2) for layer, heads in enumerate(block_heads))


def _per_layer_size(keys: ConfigKeys, family: Family, where: str) -> int:
    """Numbers that a token has in a table for each block."""
    if "ple_in" not in family.linears:
        return 0
    size, rows = keys.get("hidden_size_per_layer_input") or 0, keys.get("vocab_size_per_layer_input")
    if size and rows != keys.get("vocab_size"):
        raise ModelError(
            f"{where}: vocab_size_per_layer_input is {rows}, vocab_size is {keys.get('vocab_size')}; they must be equal"
        )
    return int(size)


def _delta_net(keys: ConfigKeys, activation: str, where: str) -> DeltaNet:
    """The shape of the layers of linear attention."""
    found = DeltaNet(
        key_heads=keys.get("linear_num_key_heads"),
        value_heads=keys.get("linear_num_value_heads"),
        key_dim=keys.get("linear_key_head_dim"),
        value_dim=keys.get("linear_value_head_dim"),
        taps=keys.get("linear_conv_kernel_dim"),
    )
    for key, size in (("linear_key_head_dim", found.key_dim), ("linear_value_head_dim", found.value_dim)):
        if size % HEAD_DIM_STEP:
            raise ModelError(f"{where}: {key} is {size}; the kernels need a multiple of {HEAD_DIM_STEP}")
    if ACTIVATIONS[activation] != "silu":
        raise ModelError(f"{where}: hidden_act is {activation!r}; layers of linear attention need silu")
    return found


def _ffn_size(keys: ConfigKeys, family: Family) -> int:
    """The width of the MLP.  LFM2's config gives a width that is cut to two thirds and rounded up."""
    size: int = keys.get(family.ffn_size)
    if not keys.get("block_auto_adjust_ff_dim"):
        return size
    size = int(2 * size / 3)
    multiplier, multiple = keys.get("block_ffn_dim_multiplier"), keys.get("block_multiple_of")
    return size if multiplier is None else -(-int(multiplier * size) // multiple) * multiple


def _attention_scale(keys: ConfigKeys, head_dim: int) -> float:
    multiplier = keys.get("attention_multiplier")
    if multiplier is not None:
        return float(multiplier)
    return float((keys.get("query_pre_attn_scalar") or head_dim) ** -0.5)


def _rotates(keys: ConfigKeys, family: Family, window: int | None, kinds: tuple[str, ...]) -> tuple[bool, ...] | None:
    """Whether q and k are rotated, by layer."""
    listed = keys.get("no_rope_layers")  # 1 for a layer with rotation
    if listed is not None:
        rotates = tuple(bool(one) for one in listed[: len(kinds)])
    elif family.windows_rotate and window is not None:
        rotates = tuple(kind == SLIDING for kind in kinds)
    else:
        rotates = (keys.get("position_embedding_type", "rope") == "rope",) * len(kinds)
    return None if all(rotates) else rotates


def _context_length(keys: ConfigKeys) -> int:
    """The longest context that one table of rotations serves.

    A model with longrope uses other frequencies past its original length, and so other keys for all earlier tokens.
    """
    longest: int = keys.get("max_position_embeddings")
    if keys.rope("rope_type") != "longrope":
        return longest
    original = keys.rope("original_max_position_embeddings") or keys.get("original_max_position_embeddings")
    return min(longest, int(original))
