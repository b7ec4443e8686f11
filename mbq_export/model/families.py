"""The shape of a decoder: one row per model family, one description per model.

Every family here is a pre-norm decoder with RMS norms, rotary embeddings, grouped-query attention and a gated MLP.
A row says where the family differs.  Calibration and the lowerings read a ``Decoder``.  Only this module knows the
names of a checkpoint's modules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from mbq_runtime.errors import ModelError


@dataclass(frozen=True)
class Family:
    """A family and its differences.

    model_type, architecture: as in config.json.
    """

    model_type: str
    architecture: str
    qk_norm: bool = False
    """RMS norm over each head of q and k, before the rotation."""
    fused: bool = False
    """The checkpoint has one layer for q, k and v, and one for gate and up, stacked as in a unit."""
    post_norms: bool = False
    """The outputs of attention and MLP go through a norm before they are added to the residual stream."""
    norm_offset: float = 0.0
    """An RMS norm multiplies by its weight plus this."""
    scaled_embedding: bool = False
    """Rows of the embedding are multiplied by sqrt(hidden_size)."""
    local_rotary: bool = False
    """Layers with a sliding window have rotary frequencies of their own."""


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM"),
        Family("mistral", "MistralForCausalLM"),
        Family("qwen2", "Qwen2ForCausalLM"),
        Family("qwen3", "Qwen3ForCausalLM", qk_norm=True),
        Family(
            "gemma3_text", "Gemma3ForCausalLM",
            qk_norm=True, post_norms=True, norm_offset=1.0, scaled_embedding=True, local_rotary=True,
        ),
        Family("phi3", "Phi3ForCausalLM", fused=True),
    )
}  # fmt: skip


ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""The activation function of the gate, by its name in config.json."""

HEAD_DIM_STEP = 16
"""ONNX Runtime's attention with rotation needs a head size that is a multiple of this on a CPU."""

FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers, by their names in config.json."""


@dataclass(frozen=True)
class Unit:
    """Linear layers that share one input, and so one router and one sliced matmul.

    name: as in the graph and in the manifest; sources: the layers' names in the checkpoint, in the order in which their
    weights are stacked along N.
    """

    name: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of the weight and the bias of a linear layer.

    layer: the layer's name in the checkpoint; start, stop: row indices.
    """

    layer: str
    start: int
    stop: int


_SEPARATE = {
    "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_out": ("self_attn.o_proj",),
    "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_out": ("mlp.down_proj",),
}
_FUSED = _SEPARATE | {"attn_in": ("self_attn.qkv_proj",), "mlp_in": ("mlp.gate_up_proj",)}

# By Family.post_norms: the norm before each unit that ends in _in, and after each unit that ends in _out.
_NORMS = {
    False: {"attn_in": "input_layernorm", "mlp_in": "post_attention_layernorm"},
    True: {
        "attn_in": "input_layernorm",
        "attn_out": "post_attention_layernorm",
        "mlp_in": "pre_feedforward_layernorm",
        "mlp_out": "post_feedforward_layernorm",
    },
}


@dataclass(frozen=True)
class Decoder:
    """The shape of one model, in the units of its config.

    family: its row of ``FAMILIES``; layers: number of blocks; hidden_size: width of the residual stream;
    ffn_size: width of the MLP; heads: query heads; kv_heads: heads of keys and values; head_dim: channels in a head;
    vocab_size: number of tokens in the vocabulary; context_length: most tokens in a context;
    norm_eps: added to the mean square in RMS norms.
    """

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
    activation: str
    """A value of ``ACTIVATIONS``."""
    attention_scale: float
    """Multiplies q . k."""
    layer_kinds: tuple[str, ...]
    """FULL or SLIDING, by layer."""
    sliding_window: int
    """Tokens that a token attends to in sliding layers, itself included."""

    @property
    def embedding_scale(self) -> float:
        """What a row of the embedding is multiplied by."""
        return math.sqrt(self.hidden_size) if self.family.scaled_embedding else 1.0

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Rows of q, k and v in the stacked projection."""
        kv = self.kv_heads * self.head_dim
        return self.heads * self.head_dim, kv, kv

    @property
    def parts(self) -> dict[str, dict[str, slice]]:
        """By role, the rows of each part (q, k, v, o, gate, up, down) in the stacked matrix."""
        sizes = {
            "attn_in": dict(zip("qkv", self.qkv_sizes, strict=True)),
            "attn_out": {"o": self.hidden_size},
            "mlp_in": {"gate": self.ffn_size, "up": self.ffn_size},
            "mlp_out": {"down": self.hidden_size},
        }
        return {role: dict(zip(of, stacked(*of.values()), strict=True)) for role, of in sizes.items()}

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
        """(N, K) of every unit by name, in the order of ``units``."""
        shapes = {
            unit.name: self.role_shapes[role]
            for layer in range(self.layers)
            for role, unit in self.layer_units(layer).items()
        }
        return {**shapes, self.head.name: (self.vocab_size, self.hidden_size)}

    @property
    def parameters(self) -> int:
        """Number of weights: those of all units, and the embedding where it is not the head.  Norms do not count."""
        of_units = self.layers * sum(n * k for n, k in self.role_shapes.values())
        return of_units + (1 if self.tied else 2) * self.vocab_size * self.hidden_size

    def block(self, layer: int) -> str:
        """The name of a block's module.

        Args:
            layer: index of the block.
        """
        return f"model.layers.{layer}"

    def layer_units(self, layer: int) -> dict[str, Unit]:
        """The units of one block, by role.

        Args:
            layer: index of the block.
        """
        sources = _FUSED if self.family.fused else _SEPARATE
        return {
            role: Unit(f"layers.{layer}.{role}", tuple(f"{self.block(layer)}.{name}" for name in names))
            for role, names in sources.items()
        }

    @property
    def head(self) -> Unit:
        """The unit that makes logits."""
        return Unit("head", ("lm_head",))

    def units(self) -> Iterator[Unit]:
        """All units in the order in which the graph runs them."""
        for layer in range(self.layers):
            yield from self.layer_units(layer).values()
        yield self.head

    def input_norm(self, layer: int, role: str) -> str:
        """The name of the norm that makes a unit's input.

        Args:
            layer: index of the block.
            role: attn_in or mlp_in.
        """
        return f"{self.block(layer)}.{_NORMS[self.family.post_norms][role]}"

    def output_norm(self, layer: int, role: str) -> str | None:
        """The name of the norm that a unit's output goes through, or None where the family has no such norm.

        Args:
            layer: index of the block.
            role: attn_out or mlp_out.
        """
        return f"{self.block(layer)}.{_NORMS[True][role]}" if self.family.post_norms else None

    @property
    def final_norm(self) -> str:
        """The name of the norm that makes the head's input."""
        return "model.norm"

    def head_norm(self, layer: int, part: str) -> str:
        """The name of the norm over each head of q or k, where the family has one.

        Args:
            layer: index of the block.
            part: q or k.
        """
        return f"{self.block(layer)}.self_attn.{part}_norm"

    def rows(self, layer: int, part: str) -> Rows:
        """Where a part of a block is in the checkpoint.

        Args:
            layer: index of the block.
            part: q, k, v, o, gate, up or down.
        """
        role = next(role for role, of in self.parts.items() if part in of)
        within, names = self.parts[role][part], self.layer_units(layer)[role].sources
        if len(names) == 1:
            return Rows(names[0], within.start, within.stop)
        return Rows(names[list(self.parts[role]).index(part)], 0, within.stop - within.start)

    def rotary_kind(self, layer: int) -> str:
        """The kind of rotation of a block.  Blocks of one kind use the same frequencies.

        Args:
            layer: index of the block.
        """
        return self.layer_kinds[layer] if self.family.local_rotary else FULL

    def window(self, layer: int) -> int | None:
        """How many tokens a token attends to in a block, itself included, or None for all.

        Args:
            layer: index of the block.
        """
        sliding = self.layer_kinds[layer] == SLIDING and self.sliding_window < self.context_length
        return self.sliding_window if sliding else None


def stacked(*sizes: int) -> list[slice]:
    """The places of parts that are stacked one after the other.

    Args:
        sizes: number of rows of each part.
    """
    return [slice(start, stop) for start, stop in pairwise(accumulate(sizes, initial=0))]


def _supported() -> str:
    return ", ".join(f"{f.architecture} ({f.model_type})" for f in FAMILIES.values())


_WITHOUT_LOWERING = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")


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
        raise ModelError(f"{where}: architecture {seen} is not supported; supported: {_supported()}")
    return family


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
    activation = getattr(config, "hidden_act", None) or config.hidden_activation
    if activation not in ACTIVATIONS:
        raise ModelError(f"{where}: hidden_act is {activation!r}; only {', '.join(ACTIVATIONS)} have a lowering")
    for feature in _WITHOUT_LOWERING:
        if getattr(config, feature, None):
            raise ModelError(
                f"{where}: {feature} is {getattr(config, feature)!r}; only models that leave it unset have a lowering"
            )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim % HEAD_DIM_STEP:
        raise ModelError(f"{where}: head_dim is {head_dim}; the attention kernels need a multiple of {HEAD_DIM_STEP}")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or [SLIDING if window else FULL] * config.num_hidden_layers
    unknown = set(kinds) - {FULL, SLIDING}
    if unknown:
        raise ModelError(f"{where}: layers of kind {', '.join(sorted(unknown))} have no lowering")
    return Decoder(
        family=family,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_size=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        context_length=_context_length(config),
        norm_eps=config.rms_norm_eps,
        tied=config.tie_word_embeddings if tied is None else tied,
        activation=ACTIVATIONS[activation],
        attention_scale=(getattr(config, "query_pre_attn_scalar", None) or head_dim) ** -0.5,
        layer_kinds=tuple(kinds),
        sliding_window=window or config.max_position_embeddings,
    )


def _context_length(config: Any) -> int:
    """The longest context that one table of rotations serves.

    A model with longrope uses other frequencies past its original length, and so other keys for all earlier tokens.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    longest: int = config.max_position_embeddings
    if rope.get("rope_type") != "longrope":
        return longest
    original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    return min(longest, int(original))
