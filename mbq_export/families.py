"""What a decoder is made of: one row per model family, one description per model.

Every family here is a pre-norm decoder with RMS norms, rotary embeddings, grouped-query attention
and a gated MLP; a row says where it differs.  ``Decoder`` is what the lowerings read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mbq_runtime.errors import ModelError


@dataclass(frozen=True)
class Family:
    """model_type and architecture as in config.json, and the quirks a lowering must know."""

    model_type: str
    architecture: str
    qk_norm: bool = False
    """RMS norm over each head of q and k, before the rotation."""


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM"),
        Family("mistral", "MistralForCausalLM"),
        Family("qwen2", "Qwen2ForCausalLM"),
        Family("qwen3", "Qwen3ForCausalLM", qk_norm=True),
    )
}


HEAD_DIM_STEP = 16
"""ONNX Runtime's attention with rotation takes no other head sizes on a CPU."""


@dataclass(frozen=True)
class Unit:
    """Linear layers that share one input, and so one router and one sliced matmul.

    name: as it appears in the graph and the manifest; sources: the layers' names in the
    checkpoint, their weights stacked along N in this order.
    """

    name: str
    sources: tuple[str, ...]


_LAYER_UNITS = {
    "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_out": ("self_attn.o_proj",),
    "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_out": ("mlp.down_proj",),
}


@dataclass(frozen=True)
class Decoder:
    """The shape of one model, in the units of its config (elements)."""

    family: Family
    layers: int
    hidden_size: int
    ffn_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    norm_eps: float
    tied: bool
    """Whether the head is the embedding."""

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Rows of q, k and v in the stacked projection."""
        kv = self.kv_heads * self.head_dim
        return self.heads * self.head_dim, kv, kv

    @property
    def role_shapes(self) -> dict[str, tuple[int, int]]:
        """(N, K) of each role's stacked matrix in a block."""
        attended = self.heads * self.head_dim
        return {
            "attn_in": (sum(self.qkv_sizes), self.hidden_size),
            "attn_out": (self.hidden_size, attended),
            "mlp_in": (2 * self.ffn_size, self.hidden_size),
            "mlp_out": (self.hidden_size, self.ffn_size),
        }

    def unit_shapes(self) -> dict[str, tuple[int, int]]:
        """(N, K) of every routed unit by name, in the order of ``units``."""
        shapes = {
            unit.name: self.role_shapes[role]
            for layer in range(self.layers)
            for role, unit in self.layer_units(layer).items()
        }
        return {**shapes, self.head.name: (self.vocab_size, self.hidden_size)}

    def layer_units(self, layer: int) -> dict[str, Unit]:
        """The units of one block, by role."""
        return {
            role: Unit(f"layers.{layer}.{role}", tuple(f"model.layers.{layer}.{part}" for part in parts))
            for role, parts in _LAYER_UNITS.items()
        }

    @property
    def head(self) -> Unit:
        return Unit("head", ("lm_head",))

    def units(self) -> Iterator[Unit]:
        """All routed units in the order the graph runs them."""
        for layer in range(self.layers):
            yield from self.layer_units(layer).values()
        yield self.head


def _supported() -> str:
    return ", ".join(f"{f.architecture} ({f.model_type})" for f in FAMILIES.values())


def describe(config: Any, where: str) -> Decoder:
    """Read a transformers config.  Raises ModelError for a family or feature that has no lowering."""
    family = FAMILIES.get(config.model_type)
    architectures = getattr(config, "architectures", None) or []
    if family is None or any(a != family.architecture for a in architectures):
        seen = ", ".join(architectures) or config.model_type
        raise ModelError(f"{where}: architecture {seen} is not supported; supported: {_supported()}")
    if config.hidden_act not in ("silu", "swish"):
        raise ModelError(f"{where}: hidden_act is {config.hidden_act!r}; only silu has a lowering")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window and window < config.max_position_embeddings:
        raise ModelError(
            f"{where}: sliding-window attention of {window} tokens has no lowering; "
            "set sliding_window to null in config.json to run with full attention"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim % HEAD_DIM_STEP:
        raise ModelError(f"{where}: head_dim is {head_dim}; the attention kernels need a multiple of {HEAD_DIM_STEP}")
    return Decoder(
        family=family,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_size=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        tied=config.tie_word_embeddings,
    )
