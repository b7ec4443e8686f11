"""Keeps count of the keys of a config that are read, so that none that matters is ignored.

A description of a model reads the keys that it knows.  What transformers' model of the family reads besides is known
too: the fields that its config class declares, and the keys that its source names.  A key that transformers reads, that
the description does not, and that has another value than the class gives it by default, changes what the model
computes.  Such a model is refused.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

_INERT = {
    "initializer_range", "use_cache", "attention_dropout", "residual_dropout", "resid_pdrop", "embd_pdrop",
    "pretraining_tp", "output_router_logits", "router_aux_loss_coef", "bos_token_id", "eos_token_id", "pad_token_id",
    "eod_token_id",
}  # fmt: skip
"""Keys that change training, or how a model is called, but not what it computes of tokens."""

_IN_WEIGHTS = {"attention_bias", "attention_out_bias", "mlp_bias", "use_bias", "conv_bias"}
"""Keys that say which weights there are.  A weight that the description does not know is refused when it is loaded."""

_IN_OTHER_KEYS = {
    "max_window_layers", "no_rope_layer_interval", "sliding_window_pattern", "partial_rotary_factor", "rope_scaling",
    "rope_theta", "original_max_position_embeddings", "full_attn_idxs", "block_ffn_dim_multiplier", "block_multiple_of",
}  # fmt: skip
"""Keys that transformers' config class itself turns into ``layer_types``, ``no_rope_layers`` or ``rope_parameters``."""

_IN_TABLES = {
    "rope_type", "type", "rope_theta", "factor", "partial_rotary_factor", "original_max_position_embeddings",
    "max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor",
    "mscale", "mscale_all_dim", "short_factor", "long_factor", "truncate", "alpha", "mrope_section",
    "mrope_interleaved",
}  # fmt: skip
"""Keys of ``rope_parameters`` that only change the frequencies and the scale of a rotation.  A bundle holds the
table that transformers makes of them.  Those of mrope divide the frequencies among the axes of an image; of a text all
axes have the same positions."""

_READ = re.compile(r"""\bconfig\.(\w+)|\bgetattr\(\s*(?:self\.)?config,\s*["'](\w+)["']""")


class ConfigKeys:
    """A config of transformers, and which of its keys have been read.

    Args:
        config: transformers' config of a text model.
        without: first parts of keys that describe parts which the model does not have.
    """

    def __init__(self, config: Any, without: tuple[str, ...] = ()) -> None:
        self._config, self._without = config, without
        config_class: Any = type(config)
        self._usual = _defaults(config_class)
        self._known = self._usual.keys() | _named_in_source(config_class) | {"tie_word_embeddings"}
        self._read: set[str] = set()
        self._read_of_rope: set[str] = set()
        self._by_layer: set[str] = getattr(config, "per_layer_attributes", None) or set()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, which counts as read.

        Args:
            key: as in config.json.
            default: for a key that the config does not have, or that transformers does not read of this family.
        """
        if key in self._by_layer:  # remains unread: the caller does not know that layers differ
            return getattr(self._config.per_layer_config[0], key)
        self._read.add(key)
        return getattr(self._config, key, default) if key in self._known else default

    def by_layer(self, key: str) -> list[Any]:
        """The value of a key for each layer, which counts as read.  In most families all layers have the same.

        Args:
            key: as in config.json.
        """
        self._read.add(key)
        if key not in self._by_layer:
            return [self.get(key)] * self.get("num_hidden_layers")
        return [getattr(layer, key) for layer in self._config.per_layer_config]

    def rope(self, key: str) -> Any:
        """The value of a key of ``rope_parameters``, which counts as read; None for a key that it does not have.

        Args:
            key: as in config.json.
        """
        self._read_of_rope.add(key)
        return (getattr(self._config, "rope_parameters", None) or {}).get(key)

    def rotated_shares(self) -> set[float]:
        """The share of a head's channels that is rotated, of each table of rotations: 1 for a table of all channels."""
        rope = getattr(self._config, "rope_parameters", None) or {}
        tables = [table for table in rope.values() if isinstance(table, Mapping)] or [rope]
        # "proportional" turns all channels, some of them by nothing.
        return {
            1.0 if table.get("rope_type") == "proportional" else float(table.get("partial_rotary_factor") or 1)
            for table in tables
        }

    def unread(self) -> Iterator[tuple[str, Any]]:
        """Keys with their values that transformers reads, that have not been read, and that are not as by default."""
        known = self._read | _INERT | _IN_WEIGHTS | _IN_OTHER_KEYS | {"rope_parameters", "per_layer_config"}
        given = self._config.to_dict()
        yield from ((f"per_layer_config.{key}", "not the same in all layers") for key in self._by_layer - known)
        if any(getattr(layer, "skip", None) for layer in getattr(self._config, "per_layer_config", ())):
            yield "per_layer_config.skip", "not empty"
        for key in sorted((self._usual.keys() | (self._known & given.keys())) - known - self._by_layer):
            value = getattr(self._config, key, None)
            if not key.startswith(self._without or "\0") and value != self._usual.get(key):
                yield key, value
        yield from self._unread_of_rope(getattr(self._config, "rope_parameters", None) or {}, "rope_parameters")

    def _unread_of_rope(self, rope: Mapping[str, Any], name: str) -> Iterator[tuple[str, Any]]:
        for key, value in rope.items():
            if isinstance(value, Mapping):  # of one kind of layers
                yield from self._unread_of_rope(value, f"{name}.{key}")
            elif key not in _IN_TABLES | self._read_of_rope and value is not None:
                yield f"{name}.{key}", value


@cache
def _defaults(config_class: Any) -> dict[str, Any]:
    """By key, the value that a config of the class has when nothing is given.  Keys of all models are left out."""
    from transformers import PreTrainedConfig

    of_all, usual = {field.name for field in fields(PreTrainedConfig)}, config_class()
    if getattr(usual, "is_heterogeneous", False):
        usual = usual.per_layer_config[0]
    named = (field.name for field in fields(config_class))
    return {name: getattr(usual, name, None) for name in named if name not in of_all and not name.startswith("_")}


@cache
def _named_in_source(config_class: Any) -> set[str]:
    """Keys that the family's source in transformers reads of its config."""
    from transformers import PreTrainedConfig

    folder = Path(inspect.getfile(config_class)).parent
    texts = (path.read_text(encoding="utf-8") for path in sorted(folder.glob("modeling_*.py")))
    of_all = {field.name for field in fields(PreTrainedConfig)}
    return {first or second for text in texts for first, second in _READ.findall(text)} - of_all
