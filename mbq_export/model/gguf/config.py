"""A transformers config from GGUF metadata: one row for each architecture of llama.cpp."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..config_schema import check_values
from .file import GgufFile

LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
"""Tensors with the rotation factors of longrope."""

_MISTRAL_7B_V01 = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 32768,
}  # fmt: skip
_MISTRAL_7B_V01_WINDOW = 4096
"""Mistral 7B v0.1 (published config.json) and its descendants: their GGUF does not hold the window.  Later versions
have no window, and another rope_theta."""


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp's files of one architecture map to a family.

    name: ``general.architecture``.
    model_type: of the transformers config.
    activation: name in the config.
    permuted: q and k rows are stored in llama.cpp's interleaved order.
    fused: the family stacks q, k and v, and gate and up.
    norm_shift: what the converter added to norm weights.
    post_norms: norms behind attention and MLP.
    """

    name: str
    model_type: str
    activation: str = "silu"
    permuted: bool = False
    fused: bool = False
    norm_shift: float = 0.0
    post_norms: bool = False


ARCHITECTURES = {
    row.name: row
    for row in (
        Architecture("llama", "llama", permuted=True),
        Architecture("qwen2", "qwen2"),
        Architecture("qwen3", "qwen3"),
        Architecture("gemma3", "gemma3_text", "gelu_pytorch_tanh", norm_shift=1.0, post_norms=True),
        Architecture("phi3", "phi3", fused=True),
    )
}


def architecture_of(file: GgufFile) -> Architecture:
    """The row of the file's architecture.

    Args:
        file: an open file.

    Raises:
        ModelError: llama.cpp's architecture has no row.
    """
    found = ARCHITECTURES.get(file.architecture)
    if found is None:
        supported = ", ".join(ARCHITECTURES)
        raise file.fault(f"GGUF architecture {file.architecture!r} is not supported; supported: {supported}")
    return found


def config_of(file: GgufFile) -> Any:
    """The transformers config of the model in the file.

    Args:
        file: an open file.

    Raises:
        ModelError: the architecture or a value is not supported, or a key is missing.
    """
    from transformers import AutoConfig

    row = architecture_of(file)
    values = _shape(file) | _stop_tokens(file) | {"architectures": [_ARCHITECTURE_CLASSES[row.model_type]]}
    values["hidden_act" if row.model_type != "gemma3_text" else "hidden_activation"] = row.activation
    values |= _BY_MODEL_TYPE[row.model_type](file, values)
    if not file.get("{arch}.attention.causal", bool, True):
        raise file.fault("its attention is not causal; only decoders are supported")
    model_type = values.pop("model_type", row.model_type)
    try:
        return AutoConfig.for_model(model_type, **values)
    # transformers checks the values in its own way, by several kinds of exception.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise file.fault(f"its metadata make no config of a {model_type} model: {reason}") from error


_ARCHITECTURE_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}


def _uniform(value: Any) -> int:
    """One number for all layers: a number, or a list of equal ones."""
    numbers = set(value) if isinstance(value, list) else {value}
    if len(numbers) != 1:
        raise ValueError(value)
    return int(numbers.pop())


def _shape(file: GgufFile) -> dict[str, Any]:
    """What all architectures say alike."""
    heads = file.need("{arch}.attention.head_count", _uniform)
    if heads < 1:
        raise file.fault(f"{file.architecture}.attention.head_count is {heads}; 1 or more are needed")
    hidden = file.need("{arch}.embedding_length", int)
    head_dim = file.get("{arch}.attention.key_length", int, hidden // heads)
    values_dim = file.get("{arch}.attention.value_length", int, head_dim)
    if values_dim != head_dim:
        raise file.fault(f"heads of values have {values_dim} numbers, heads of keys {head_dim}; they must be equal")
    if not file.has("token_embd.weight"):
        raise file.fault("tensor token_embd.weight is missing; the file is no language model")
    rows = file.shape("token_embd.weight")[0]
    said = file.get("{arch}.vocab_size", int, rows)
    if said != rows:
        raise file.fault(f"{file.architecture}.vocab_size is {said}, the embedding has {rows} rows; they must be equal")
    found = {
        "num_hidden_layers": file.need("{arch}.block_count", int),
        "max_position_embeddings": file.need("{arch}.context_length", int),
        "hidden_size": hidden,
        "intermediate_size": file.need("{arch}.feed_forward_length", _uniform),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get("{arch}.attention.head_count_kv", _uniform, heads),
        "head_dim": head_dim,
        "rms_norm_eps": file.need("{arch}.attention.layer_norm_rms_epsilon", float),
        "vocab_size": rows,
        "tie_word_embeddings": not file.has("output.weight"),
    }
    # Before a list is made of that many layers.
    check_values(found, f"{file.path.name}: metadata, by its names in config.json")
    return found


def _stop_tokens(file: GgufFile) -> dict[str, Any]:
    """bos, and every token that ends a reply: end of sequence, of turn and of message."""
    ids = [file.get(f"tokenizer.ggml.{name}_token_id", int) for name in ("eos", "eot", "eom")]
    found = list(dict.fromkeys(i for i in ids if i is not None))
    return {
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": found[0] if len(found) == 1 else found or None,
        "pad_token_id": file.get("tokenizer.ggml.padding_token_id", int),
    }


def _rotation(file: GgufFile, rotated: int) -> dict[str, Any]:
    """``rope_parameters`` of a config.

    rotated: how many numbers of a head are rotated, as the file must say it or leave it out.
    """
    arch = file.architecture
    dimensions = file.get("{arch}.rope.dimension_count", int, rotated)
    if dimensions != rotated:
        raise file.fault(f"{arch}.rope.dimension_count is {dimensions}; {rotated} are needed")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": file.get("{arch}.rope.freq_base", float, 10000.0)}
    kind = file.get("{arch}.rope.scaling.type", str, "linear")  # llama.cpp scales by a factor without a type
    factor = file.get("{arch}.rope.scaling.factor", float) or file.get("{arch}.rope.scale_linear", float)
    original = file.get("{arch}.rope.scaling.original_context_length", int)
    attention = file.get("{arch}.rope.scaling.attn_factor", float)
    file.get("{arch}.rope.scaling.finetuned", bool)  # says how the model was trained, not what it computes
    longrope = file.has(LONG_FACTORS) or file.has(SHORT_FACTORS)
    if kind == "longrope" or longrope:
        return rope | _longrope(file, original, attention)
    if kind == "yarn":
        return rope | _yarn(file, factor, original, attention)
    if kind not in ("none", "linear"):
        raise file.fault(f"{arch}.rope.scaling.type is {kind!r}; supported: none, linear, yarn, longrope")
    if attention not in (None, 1.0):
        raise file.fault(f"{arch}.rope.scaling.attn_factor is {attention}; only yarn and longrope may have one but 1")
    if kind == "linear" and factor not in (None, 0.0, 1.0):
        return rope | {"rope_type": "linear", "factor": factor}
    return rope


def _yarn(file: GgufFile, factor: float | None, original: int | None, attention: float | None) -> dict[str, Any]:
    if factor is None or original is None:
        raise file.fault("yarn needs rope.scaling.factor and rope.scaling.original_context_length; one is missing")
    found: dict[str, Any] = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    attention = attention if attention is not None else file.get("{arch}.rope.scaling.yarn_attn_factor", float)
    if attention is not None:
        # llama.cpp multiplies YaRN's own scale by it.  transformers takes it in place of that scale.
        found["attention_factor"] = attention * (1 + 0.1 * math.log(max(factor, 1.0)))
    for side in ("beta_fast", "beta_slow"):
        value = file.get(f"{{arch}}.rope.scaling.yarn_{side}", float)
        if value is not None:
            found[side] = value
    extrapolation = file.get("{arch}.rope.scaling.yarn_ext_factor", float, 1.0)
    if extrapolation not in (1.0, -1.0):  # -1 is llama.cpp's word for the default
        raise file.fault(f"rope.scaling.yarn_ext_factor is {extrapolation}; only 1 is supported")
    return found


def _longrope(file: GgufFile, original: int | None, attention: float | None) -> dict[str, Any]:
    missing = [name for name in (LONG_FACTORS, SHORT_FACTORS) if not file.has(name)]
    if missing or original is None:
        what = missing[0] if missing else "rope.scaling.original_context_length"
        raise file.fault(f"longrope needs {what}, which is missing")
    found = {
        "rope_type": "longrope",
        "long_factor": file.tensor(LONG_FACTORS).astype(float).tolist(),
        "short_factor": file.tensor(SHORT_FACTORS).astype(float).tolist(),
        "original_max_position_embeddings": original,
    }
    return found if attention is None else found | {"attention_factor": attention}


def _llama(file: GgufFile, values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_parameters": _rotation(file, values["head_dim"])}
    window = file.get("{arch}.attention.sliding_window", int) or _missing_window(values, found["rope_parameters"])
    biases = _biases(file)
    if window:
        if biases:
            raise file.fault("it has a sliding window and biases; no family has both")
        return found | {
            "model_type": "mistral", "sliding_window": window, "architectures": ["MistralForCausalLM"],
        }  # fmt: skip
    return found | biases


def _biases(file: GgufFile) -> dict[str, Any]:
    """Which of a Llama's linear layers have biases."""
    names = [name for name in file.tensor_names if name.endswith(".bias")]
    return {
        key: True
        for key, parts in (("attention_bias", ("attn_",)), ("mlp_bias", ("ffn_",)))
        if any(part in name for name in names for part in parts)
    }


def _missing_window(values: dict[str, Any], rope: dict[str, Any]) -> int | None:
    """The window of a published model whose file does not hold it."""
    same = all(values[key] == value for key, value in _MISTRAL_7B_V01.items())
    return _MISTRAL_7B_V01_WINDOW if same and rope["rope_theta"] == 10000.0 else None


def _qwen(file: GgufFile, values: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": _rotation(file, values["head_dim"]), "use_sliding_window": False}


def _gemma3(file: GgufFile, values: dict[str, Any]) -> dict[str, Any]:
    layers = values["num_hidden_layers"]
    window = file.get("{arch}.attention.sliding_window", int, 0)
    pattern = file.get("{arch}.attention.sliding_window_pattern", _pattern, 6)
    kinds = [
        "sliding_attention" if window and _is_sliding(pattern, layer) else "full_attention" for layer in range(layers)
    ]
    local = {"rope_type": "default", "rope_theta": file.get("{arch}.rope.freq_base_swa", float, 10000.0)}
    # llama.cpp knows the 27B model by its number of layers: its queries are scaled by the width of a head of the
    # residual stream.
    scalar = values["hidden_size"] // values["num_attention_heads"] if layers == 62 else values["head_dim"]
    found: dict[str, Any] = {
        "rope_parameters": {"full_attention": _rotation(file, values["head_dim"]), "sliding_attention": local},
        "layer_types": kinds,
        "query_pre_attn_scalar": file.get("{arch}.attention.scale", lambda scale: round(float(scale) ** -2), scalar),
        "attn_logit_softcapping": file.get("{arch}.attn_logit_softcapping", float),
        "final_logit_softcapping": file.get("{arch}.final_logit_softcapping", float),
    }
    return found | ({"sliding_window": window} if window else {})


def _pattern(value: Any) -> Any:
    """A period, or a truth value for each layer."""
    return [bool(one) for one in value] if isinstance(value, list) else int(value)


def _is_sliding(pattern: Any, layer: int) -> bool:
    return bool(pattern[layer]) if isinstance(pattern, list) else (layer + 1) % pattern != 0


def _phi3(file: GgufFile, values: dict[str, Any]) -> dict[str, Any]:
    rotated = file.get("{arch}.rope.dimension_count", int, values["head_dim"]) or values["head_dim"]
    rope = _rotation(file, rotated) | {"partial_rotary_factor": rotated / values["head_dim"]}
    original = rope.get("original_max_position_embeddings") or file.get(
        "{arch}.rope.scaling.original_context_length", int, values["max_position_embeddings"]
    )
    window = file.get("{arch}.attention.sliding_window", int, 0)
    return {
        "rope_parameters": rope,
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "original_max_position_embeddings": original,
        # The converter writes 0 for a model without a window.
        "sliding_window": window or None,
    }


_BY_MODEL_TYPE: dict[str, Callable[[GgufFile, dict[str, Any]], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
}
"""What an architecture says in its own way."""
