"""The families of decoders: one row each, which says how a checkpoint of the family is built.

A decoder is a list of blocks.  A block is a mixer (attention, a short convolution, or a gated delta net), then a
feed-forward (a gated MLP, or experts), with RMS norms in stated places.  A row says where the family differs from
Llama.  Only this module knows the names of a checkpoint's modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mbq_runtime.errors import ModelError

Linears = Mapping[str, tuple[str, ...]]
"""By role, the linear layers of a unit by their names in a block, in the order in which they are stacked."""

LINEARS: Linears = {
    "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_out": ("self_attn.o_proj",),
    "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_out": ("mlp.down_proj",),
}
_FUSED_MLP: Linears = {**LINEARS, "mlp_in": ("mlp.gate_up_proj",)}
_FUSED: Linears = {**_FUSED_MLP, "attn_in": ("self_attn.qkv_proj",)}
_SHARED_MLP: Linears = {**LINEARS, "mlp_in": ("shared_mlp.input_linear",), "mlp_out": ("shared_mlp.output_linear",)}

_SHORT_CONV: Linears = {
    "attn_in": LINEARS["attn_in"],
    "attn_out": ("self_attn.out_proj",),
    "conv_in": ("conv.in_proj",),
    "conv_out": ("conv.out_proj",),
    "mlp_in": ("feed_forward.w1", "feed_forward.w3"),
    "mlp_out": ("feed_forward.w2",),
}

_GATED_CONV: Linears = {
    **_SHORT_CONV,
    "attn_in": (*LINEARS["attn_in"], "self_attn.g_proj"),
    "attn_out": LINEARS["attn_out"],
}

_DELTA_NET: Linears = {
    "attn_in": LINEARS["attn_in"],
    "attn_out": LINEARS["attn_out"],
    "delta_in": (
        "linear_attn.in_proj_qkv",
        "linear_attn.in_proj_z",
        "linear_attn.in_proj_b",
        "linear_attn.in_proj_a",
    ),
    "delta_out": ("linear_attn.out_proj",),
    "mlp_in": LINEARS["mlp_in"],
    "mlp_out": LINEARS["mlp_out"],
}

_PER_LAYER: Linears = {
    **LINEARS,
    "ple_embed": ("per_layer_model_projection",),
    "ple_in": ("per_layer_input_gate",),
    "ple_out": ("per_layer_projection",),
}
"""With the linear layers of per-layer embeddings.  ``per_layer.divide`` gives each block its rows of the first."""

Norms = Mapping[str, str]
"""By role, the norm before a unit that ends in _in, and the norm after a unit that ends in _out, by its name in a
block.  A role that is not named has no norm there."""

PRE_NORMS: Norms = {"attn_in": "input_layernorm", "mlp_in": "post_attention_layernorm"}
POST_NORMS: Norms = {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}
SANDWICH_NORMS: Norms = {**POST_NORMS, "attn_in": "input_layernorm", "mlp_in": "pre_feedforward_layernorm"}
_BESIDE_NORMS: Norms = {
    "mlp_out": "post_feedforward_layernorm_1",
    "experts_in": "pre_feedforward_layernorm_2",
    "experts_out": "post_feedforward_layernorm_2",
    "both_out": "post_feedforward_layernorm",
}
_PER_LAYER_NORMS: Norms = {**SANDWICH_NORMS, "ple_out": "post_per_layer_input_norm"}
_LFM_NORMS: Norms = {"attn_in": "operator_norm", "conv_in": "operator_norm", "mlp_in": "ffn_norm"}
_LFM3_NORMS: Norms = {
    **_LFM_NORMS,
    "attn_out": "post_operator_norm",
    "conv_out": "post_operator_norm",
    "mlp_out": "post_ffn_norm",
}
_DELTA_NORMS: Norms = {**PRE_NORMS, "delta_in": "input_layernorm"}
_GLM_NORMS: Norms = {**PRE_NORMS, "attn_out": "post_self_attn_layernorm", "mlp_out": "post_mlp_layernorm"}


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms of q and k.

    q, k: their names in a block.
    """

    q: str = "self_attn.q_norm"
    k: str = "self_attn.k_norm"
    whole_row: bool = False
    """One norm over all heads together.  False: the same norm over each head."""
    rotated_first: bool = False
    """The norms come after the rotation."""


@dataclass(frozen=True)
class ExpertNames:
    """Names of a block with experts, which are gated MLPs of which a token takes a few.

    chooser: the module whose weight, [experts, hidden], scores the experts of a token; experts: the list of experts;
    layers: gate, up and down of one expert.
    """

    chooser: str = "mlp.gate"
    experts: str = "mlp.experts"
    layers: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    sigmoid: bool = False
    """The share of an expert is the sigmoid of its score.  False: shares are the softmax of the scores."""
    bias: str | None = None
    """What is added to the shares to choose experts, but not to their weights; None for nothing."""
    joined: tuple[str, str] | None = None
    """The layers of all experts in the files, if they are there together: gate and up, [experts, 2 * ffn, hidden], and
    down, [experts, hidden, ffn]."""
    renamed: tuple[str, str] | None = None
    """A module's name in the files, and in the model."""
    beside: Norms | None = None
    """The norms of a block whose experts stand beside an MLP.  Both read the same stream.  ``both_out`` is behind the
    sum of what they put out.  None: experts stand in the place of the MLP, and have its norms."""


@dataclass(frozen=True)
class Family:
    """A family and its differences from Llama.

    model_type, architecture: as in config.json; linears: its linear layers; norms: the norms of its blocks;
    head_norms: norms of q and k, None for none.
    """

    model_type: str
    architecture: str
    linears: Linears = field(default_factory=lambda: LINEARS)
    norms: Norms = field(default_factory=lambda: PRE_NORMS)
    head_norms: HeadNorms | None = None
    norm_offset: float = 0.0
    """An RMS norm multiplies by its weight plus this."""
    scaled_embedding: bool = False
    """Rows of the embedding are multiplied by sqrt(hidden_size)."""
    local_rotary: bool = False
    """Layers with a sliding window have rotary frequencies of their own."""
    interleaved: bool = False
    """A rotation turns neighbouring channels of a head.  False: a channel of the first half with one of the second."""
    windows_rotate: bool = False
    """In a model with sliding windows only the layers with a window rotate q and k."""
    activation: str | None = None
    """The activation of the gate, in a family whose config does not say it."""
    rotary: str = "model.rotary_emb"
    """The name of the module that makes rotations."""
    final_norm: str = "model.norm"
    """The name of the norm before the head."""
    norm_eps: str = "rms_norm_eps"
    """The key of what is added to the mean square in RMS norms."""
    head_gates: bool = False
    """What a head attends to is multiplied by the sigmoid of a number, which a layer behind q, k and v makes."""
    channel_gates: bool = False
    """What a head attends to is multiplied, channel by channel, by the sigmoid of numbers that the layer of q makes: of
    each head first the query, then the gates."""
    growing_queries: bool = False
    """Queries grow with their position by ``llama_4_scaling_beta``."""
    value_norms: bool = False
    """Each head of values goes through an RMS norm that multiplies by 1."""
    scores_as_they_are: bool = False
    """q . k is not multiplied by anything."""
    capped_scores: bool = False
    """``attn_logit_softcapping`` caps q . k.  transformers' Gemma 3 names the key, and caps nothing."""
    layer_scalars: bool = False
    """The residual stream behind a block is multiplied by the block's ``layer_scalar``."""
    ffn_size: str = "intermediate_size"
    """The key of the MLP's width in config.json."""
    experts: ExpertNames | None = None
    """Names of a block with experts.  None: the family has no such block."""
    without: tuple[str, ...] = ()
    """First parts of keys that only describe parts which a supported model of the family does not have."""


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM"),
        Family("mistral", "MistralForCausalLM"),
        Family("ministral", "MinistralForCausalLM"),
        Family("ministral3", "Ministral3ForCausalLM", growing_queries=True),
        Family("qwen2", "Qwen2ForCausalLM"),
        Family("qwen3", "Qwen3ForCausalLM", head_norms=HeadNorms()),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", head_norms=HeadNorms(), experts=ExpertNames()),
        Family(
            "qwen3_5_text", "Qwen3_5ForCausalLM",
            linears=_DELTA_NET, norms=_DELTA_NORMS, norm_offset=1.0, head_norms=HeadNorms(), channel_gates=True,
        ),
        Family("smollm3", "SmolLM3ForCausalLM"),
        Family("seed_oss", "SeedOssForCausalLM"),
        Family("granite", "GraniteForCausalLM"),
        Family(
            "granitemoe", "GraniteMoeForCausalLM",
            experts=ExpertNames(
                "block_sparse_moe.router", "block_sparse_moe.experts",
                joined=("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
                renamed=("block_sparse_moe.router.layer", "block_sparse_moe.router"),
            ),
        ),
        Family(
            "granitemoehybrid", "GraniteMoeHybridForCausalLM",
            linears=_SHARED_MLP, ffn_size="shared_intermediate_size",
            without=(
                "mamba_", "time_step_limit", "num_experts_per_tok", "router_aux_loss_coef", "intermediate_size",
                "layers_block_type",
            ),
        ),
        Family(
            "gemma", "GemmaForCausalLM",
            norm_offset=1.0, scaled_embedding=True,
        ),
        Family(
            "gemma2", "Gemma2ForCausalLM",
            norms=SANDWICH_NORMS, norm_offset=1.0, scaled_embedding=True, capped_scores=True,
        ),
        Family(
            "gemma3_text", "Gemma3ForCausalLM",
            head_norms=HeadNorms(), norms=SANDWICH_NORMS, norm_offset=1.0, scaled_embedding=True, local_rotary=True,
        ),
        Family(
            "gemma4_text", "Gemma4ForCausalLM",
            linears=_PER_LAYER, norms=_PER_LAYER_NORMS, head_norms=HeadNorms(), value_norms=True,
            scores_as_they_are=True, scaled_embedding=True, local_rotary=True, layer_scalars=True,
            experts=ExpertNames(
                "router.proj", "experts", joined=("experts.gate_up_proj", "experts.down_proj"), beside=_BESIDE_NORMS
            ),
        ),
        Family("phi3", "Phi3ForCausalLM", linears=_FUSED),
        Family("olmo2", "Olmo2ForCausalLM", norms=POST_NORMS, head_norms=HeadNorms(whole_row=True)),
        Family(
            "olmo3", "Olmo3ForCausalLM",
            norms=POST_NORMS, head_norms=HeadNorms(whole_row=True), local_rotary=True,
        ),
        Family("exaone4", "Exaone4ForCausalLM", norms=POST_NORMS, head_norms=HeadNorms(), windows_rotate=True),
        Family(
            "hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM",
            head_norms=HeadNorms("self_attn.query_layernorm", "self_attn.key_layernorm", rotated_first=True),
        ),
        Family(
            "lfm2", "Lfm2ForCausalLM",
            linears=_SHORT_CONV, norms=_LFM_NORMS, final_norm="model.embedding_norm", norm_eps="norm_eps",
            activation="silu",
            head_norms=HeadNorms("self_attn.q_layernorm", "self_attn.k_layernorm"),
        ),
        Family(
            "lfm2_moe", "Lfm2MoeForCausalLM",
            linears=_SHORT_CONV, norms=_LFM_NORMS, final_norm="model.embedding_norm", norm_eps="norm_eps",
            activation="silu", rotary="model.pos_emb",
            head_norms=HeadNorms("self_attn.q_layernorm", "self_attn.k_layernorm"),
            experts=ExpertNames(
                "feed_forward.gate", "feed_forward.experts", ("w1", "w3", "w2"),
                sigmoid=True, bias="feed_forward.expert_bias",
            ),
        ),
        Family(
            "lfm3", "Lfm3ForCausalLM",
            linears=_GATED_CONV, norms=_LFM3_NORMS, final_norm="model.embedding_norm", norm_eps="norm_eps",
            activation="silu", head_norms=HeadNorms(), head_gates=True, local_rotary=True,
        ),
        Family("ernie4_5", "Ernie4_5ForCausalLM", interleaved=True),
        Family("helium", "HeliumForCausalLM", interleaved=True),
        Family("glm4", "Glm4ForCausalLM", linears=_FUSED_MLP, norms=_GLM_NORMS, interleaved=True),
    )
}  # fmt: skip


WRAPPERS = {
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma4": "Gemma4ForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
}
"""Models of text and other media, by ``model_type``, with their entry in ``architectures``.  Their text part loads."""


NOT_YET = {
    "gpt_oss": "attention sinks, and experts with biases and a clamped gate",
}
"""What known families have that no lowering does, by ``model_type``."""


def supported() -> str:
    """The families that have a lowering, for messages."""
    named = ", ".join(f"{f.architecture} ({f.model_type})" for f in FAMILIES.values())
    return f"{named}; and the text parts of {', '.join(WRAPPERS.values())}"


def check_family(model_type: str, architectures: Any, where: str) -> Family:
    """The family of a model.

    Args:
        model_type: as config.json has it.
        architectures: as config.json has them, or None.
        where: the model's name, for errors.

    Raises:
        ModelError: the family has no lowering.
    """
    family, named = FAMILIES.get(model_type), architectures or []
    if family is None or not isinstance(named, list) or any(name != family.architecture for name in named):
        seen = ", ".join(map(str, named)) if isinstance(named, list) and named else model_type
        why = f": {NOT_YET[model_type]} have no lowering" if model_type in NOT_YET else ""
        raise ModelError(f"{where}: architecture {seen} is not supported{why}; supported: {supported()}")
    return family
