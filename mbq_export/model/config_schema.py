"""What a config may say: the type and the range of every value that the exporter or transformers computes with.

The values are checked before transformers sees them: a number of layers of 10^9 would fill the memory there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from mbq_runtime.errors import ModelError

from ..lines import one_line

MOST_LAYERS = 1000


@dataclass(frozen=True)
class Range:
    """Numbers that a value may have.

    low, high: the bounds, both included; whole: whether only whole numbers are in it.
    """

    low: float
    high: float
    whole: bool = True

    def holds(self, value: Any) -> bool:
        """Whether a value from a file is in the range.

        Args:
            value: any value of JSON.
        """
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        return bool(self.low <= value <= self.high)

    def __str__(self) -> str:
        if self.whole:
            return f"a whole number from {self.low} to {self.high}"
        return f"a number from {self.low:g} to {self.high:g}"


_FACTOR = Range(1e-6, 1e6, whole=False)

SIZES = {
    "num_hidden_layers": Range(1, MOST_LAYERS),
    "hidden_size": Range(1, 1 << 17),
    "intermediate_size": Range(1, 1 << 20),
    "num_attention_heads": Range(1, 1 << 12),
    "num_key_value_heads": Range(1, 1 << 12),
    "head_dim": Range(1, 1 << 12),
    "global_head_dim": Range(1, 1 << 12),
    "num_global_key_value_heads": Range(1, 1 << 12),
    "num_kv_shared_layers": Range(0, MOST_LAYERS),
    "hidden_size_per_layer_input": Range(0, 1 << 17),
    "vocab_size_per_layer_input": Range(1, 1 << 22),
    "linear_num_key_heads": Range(1, 1 << 12),
    "linear_num_value_heads": Range(1, 1 << 12),
    "linear_key_head_dim": Range(1, 1 << 12),
    "linear_value_head_dim": Range(1, 1 << 12),
    "linear_conv_kernel_dim": Range(2, 64),
    "moe_intermediate_size": Range(1, 1 << 20),
    "num_experts": Range(0, 1 << 14),
    "num_local_experts": Range(0, 1 << 14),
    "num_experts_per_tok": Range(0, 1 << 14),
    "decoder_sparse_step": Range(1, MOST_LAYERS),
    "num_dense_layers": Range(0, MOST_LAYERS),
    "routed_scaling_factor": _FACTOR,
    "vocab_size": Range(1, 1 << 22),
    "max_position_embeddings": Range(1, 1 << 24),
    "original_max_position_embeddings": Range(1, 1 << 24),
    "sliding_window": Range(1, 1 << 31),
    "query_pre_attn_scalar": _FACTOR,
    "conv_L_cache": Range(1, 64),
    "embedding_multiplier": _FACTOR,
    "residual_multiplier": _FACTOR,
    "attention_multiplier": _FACTOR,
    "logits_scaling": _FACTOR,
    "attn_logit_softcapping": Range(0, 1e6, whole=False),
    "final_logit_softcapping": Range(0, 1e6, whole=False),
    "rms_norm_eps": Range(1e-30, 1, whole=False),
    "partial_rotary_factor": Range(1e-3, 1, whole=False),
    "rope_theta": Range(1e-3, 1e15, whole=False),
    "rope_local_base_freq": Range(1e-3, 1e15, whole=False),
}
"""By name in config.json.  A missing value, or null, is left to transformers."""

ROPE = {
    "rope_theta": SIZES["rope_theta"],
    "partial_rotary_factor": SIZES["partial_rotary_factor"],
    "original_max_position_embeddings": SIZES["original_max_position_embeddings"],
    "factor": _FACTOR,
    "attention_factor": _FACTOR,
    "beta_fast": _FACTOR,
    "beta_slow": _FACTOR,
    "low_freq_factor": _FACTOR,
    "high_freq_factor": _FACTOR,
    "mscale": Range(0, 1e6, whole=False),
    "mscale_all_dim": Range(0, 1e6, whole=False),
}
"""The same of ``rope_parameters`` or ``rope_scaling``, or of each kind of layers in it."""

_LAYER = Range(0, MOST_LAYERS)
_SWITCHES = (
    "tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "norm_topk_prob", "use_expert_bias",
)  # fmt: skip
_OBJECTS = ("rope_parameters", "rope_scaling")
_BY_LAYER = "per_layer_config"


def check_values(values: Mapping[str, Any], where: str) -> None:
    """Refuse a config with a value of another type, or out of its range.

    Args:
        values: the config, as config.json has it.
        where: the file, for errors.

    Raises:
        ModelError: the first such value, and what is needed.
    """
    for problem in chain(_wrong_values(values), _wrong_sums(values)):
        raise ModelError(f"{where}: {problem}; repair it, or download it again")


def _wrong_values(values: Mapping[str, Any]) -> Iterator[str]:
    yield from _out_of_range(values, SIZES, "")
    for name in _SWITCHES:
        if not isinstance(values.get(name, False), bool | None):
            yield f"{name} is {_shown(values[name])}; true or false is needed"
    for name in _OBJECTS:
        yield from _wrong_rope(values.get(name), name)
    by_layer = values.get(_BY_LAYER) or {}
    if not isinstance(by_layer, Mapping) or not all(isinstance(of, Mapping) for of in by_layer.values()):
        yield f"{_BY_LAYER} is {_shown(by_layer)}; an object of objects is needed"
        return
    for layer, of in by_layer.items():
        yield from _out_of_range(of, SIZES, f"{_BY_LAYER}.{layer}.")
    kinds = values.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        yield f"layer_types is {_shown(kinds)}; a list of names is needed"
    without = values.get("mlp_only_layers")
    if without is not None and not (isinstance(without, list) and all(map(_LAYER.holds, without))):
        yield f"mlp_only_layers is {_shown(without)}; a list of whole numbers from 0 to {MOST_LAYERS} is needed"


def _wrong_rope(rope: Any, name: str) -> Iterator[str]:
    if rope is None:
        return
    if not isinstance(rope, Mapping):
        yield f"{name} is {_shown(rope)}; an object is needed"
        return
    yield from _out_of_range(rope, ROPE, f"{name}.")
    for side in ("long_factor", "short_factor"):
        factors = rope.get(side)
        if factors is not None and not (isinstance(factors, list) and all(map(_FACTOR.holds, factors))):
            yield f"{name}.{side} is {_shown(factors)}; a list of numbers from 1e-06 to 1e+06 is needed"
    for kind in ("full_attention", "sliding_attention"):
        yield from _wrong_rope(rope.get(kind), f"{name}.{kind}")


def _out_of_range(values: Mapping[str, Any], ranges: Mapping[str, Range], prefix: str) -> Iterator[str]:
    for name, allowed in ranges.items():
        value = values.get(name)
        if value is not None and not allowed.holds(value):
            yield f"{prefix}{name} is {_shown(value)}; {allowed} is needed"


def _wrong_sums(values: Mapping[str, Any]) -> Iterator[str]:
    """Values that do not fit each other.  They are in their ranges."""
    layers, kinds = values.get("num_hidden_layers"), values.get("layer_types")
    if layers and kinds and len(kinds) != layers:
        yield f"layer_types names {len(kinds)} layers, num_hidden_layers is {layers}; they must be equal"
    rotated = values.get("no_rope_layers")
    if layers and isinstance(rotated, list) and 0 < len(rotated) < layers:
        yield f"no_rope_layers names {len(rotated)} layers, num_hidden_layers is {layers}; they must be equal"
    for many, few in (
        ("num_attention_heads", "num_key_value_heads"), ("linear_num_value_heads", "linear_num_key_heads"),
    ):  # fmt: skip
        if values.get(many) and values.get(few) and values[many] % values[few]:
            yield f"{many} is {values[many]}, {few} is {values[few]}; the second must divide the first"
    hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if hidden and heads and not values.get("head_dim") and hidden % heads:
        yield f"hidden_size is {hidden}, num_attention_heads is {heads}; the second must divide the first"


def _shown(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return one_line(repr(value), 40) if not isinstance(value, int) or abs(value) < 10**30 else "a number over 10^30"
