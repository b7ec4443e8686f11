"""The contents of ``genai_config.json``, by which onnxruntime-genai runs a bundle's model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ModelError
from .manifest import OPS_LIBRARY

PROMPT_CHUNK = 128
"""Prompt tokens of one pass.

Other threads, Ctrl-C and a new budget take effect between two passes.  The attention scores of a pass grow with it.
Longer passes were measured to gain little: see docs/log.md."""

# Families the engine knows by name; any other decoder runs under its generic name.
_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


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
    """What onnxruntime-genai must know of a decoder with this project's inputs and outputs.

    ``avg_bits`` and ``avg_bits_used`` have no entry: the engine sets and reads them by name.

    Args:
        family: ``model_type`` of the checkpoint.
        vocab_size: token ids the model knows.
        context_length: tokens of prompt and reply together.
        layers: decoder blocks.
        hidden_size: width of the residual stream.
        heads: query heads of a block.
        kv_heads: key and value heads of a block.
        head_dim: width of a head.
        eos_token_ids: ids that end a reply; at least one, each below ``vocab_size``.
        bos_token_id: id that opens a text, if the model has one.
        pad_token_id: None for the first of ``eos_token_ids``.
        native: the bundle has an ops library.  Its path is relative to the bundle, so that the folder can be moved.

    Raises:
        ModelError: ``eos_token_ids`` is empty or has an id outside the vocabulary.
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
            "chunk_size": PROMPT_CHUNK,
        },
    }
