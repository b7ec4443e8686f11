"""The engine's own description of a bundle's model: the contents of ``genai_config.json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ModelError
from .manifest import OPS_LIBRARY

PREFILL_LOGITS_BYTES = 32 << 20
"""Bound on the logits of one prompt chunk: the graph returns them for every token it is given."""

_MIN_CHUNK, _MAX_CHUNK = 16, 512

# Families the engine knows by name; any other decoder runs under its generic name.
_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def prefill_chunk(vocab_size: int) -> int:
    """Prompt tokens per pass: the largest power of two whose float32 logits stay in the bound."""
    tokens = PREFILL_LOGITS_BYTES // (4 * vocab_size)
    return max(_MIN_CHUNK, min(_MAX_CHUNK, 1 << max(tokens, 1).bit_length() - 1))


def genai_config(
    *,
    family: str,
    vocab_size: int,
    context_length: int,
    layers: int,
    hidden_size: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    eos_token_ids: Sequence[int],
    bos_token_id: int | None = None,
    pad_token_id: int | None = None,
    native: bool,
) -> dict[str, Any]:
    """What onnxruntime-genai needs to know of a decoder with this project's inputs and outputs.

    eos_token_ids: every id that ends a reply, each below vocab_size (ModelError otherwise);
    pad_token_id: defaults to the first of them; native: whether the bundle carries its ops library,
    named relative to the bundle so that the folder can be moved.  ``avg_bits`` and
    ``avg_bits_used`` need no entry: they are set and read by name.
    """
    eos = list(eos_token_ids)
    if not eos or not all(0 <= token < vocab_size for token in eos):
        raise ModelError(
            f"end-of-text token ids {eos}: needed at least one, each from 0 to {vocab_size - 1}; "
            "set eos_token_id in the model's generation_config.json"
        )
    ids = {"bos_token_id": bos_token_id, "pad_token_id": eos[0] if pad_token_id is None else pad_token_id}
    return {
        "model": {
            "type": family if family in _MODEL_TYPES else "decoder",
            **{name: value for name, value in ids.items() if value is not None},
            "eos_token_id": eos,
            "vocab_size": vocab_size,
            "context_length": context_length,
            "decoder": {
                "filename": "model.onnx",
                "session_options": {
                    "log_id": "mbq",
                    "provider_options": [],
                    **({"custom_ops_library": OPS_LIBRARY} if native else {}),
                },
                "hidden_size": hidden_size,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "head_size": head_dim,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": context_length,
            "num_beams": 1,
            "past_present_share_buffer": True,
            "chunk_size": prefill_chunk(vocab_size),
        },
    }
