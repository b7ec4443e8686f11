"""What is read from the configs of published models, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_models import COMMON, MODELS
from transformers import AutoConfig

from mbq_export.model.describe import describe
from mbq_export.model.families import FAMILIES
from mbq_export.model.shape import FULL, SLIDING, Decoder, Rows
from mbq_export.prepare import without_gpu_kernels
from mbq_runtime.errors import ModelError

# As published, without what says nothing of the decoder's shape.
PUBLISHED: dict[str, dict[str, object]] = {
    "gemma-3-1b-it": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    },
    "Phi-3-mini-4k-instruct": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
        "tie_word_embeddings": False,
        "vocab_size": 32064,
    },
    "Phi-4-mini-instruct": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "num_attention_heads": 24,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0 + i for i in range(48)]},
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "vocab_size": 200064,
    },
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "Qwen2.5-7B-Instruct": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
}


def described(name: str, **changes: object) -> Decoder:
    return describe(AutoConfig.for_model(**{**PUBLISHED[name], **changes}), name)


def test_gemma_3() -> None:
    d = described("gemma-3-1b-it")
    assert d.tied
    assert d.activation == "gelu_tanh"
    assert d.attention_scale == 1 / 16
    assert d.embedding_scale == pytest.approx(33.9411, abs=1e-4)
    assert d.family.norm_offset == 1
    assert (d.attention_cap, d.logits_cap) == (None, None)
    assert described("gemma-3-1b-it", final_logit_softcapping=30.0).logits_cap == 30
    assert [layer for layer in range(26) if d.window(layer) is None] == [5, 11, 17, 23]
    assert d.window(0) == 512
    assert (d.rotary_kind(0), d.rotary_kind(5)) == (SLIDING, FULL)
    assert d.role_shapes == {
        "attn_in": (1024 + 2 * 256, 1152),
        "attn_out": (1152, 1024),
        "mlp_in": (2 * 6912, 1152),
        "mlp_out": (1152, 6912),
    }
    assert d.input_norm(3, "mlp_in") == "model.layers.3.pre_feedforward_layernorm"
    assert d.output_norm(3, "attn_out") == "model.layers.3.post_attention_layernorm"
    assert d.rows(3, "v") == Rows("model.layers.3.self_attn.v_proj", 0, 256)


def test_phi_3() -> None:
    d = described("Phi-3-mini-4k-instruct")
    assert not d.tied
    assert d.head_dim == 96
    assert d.attention_scale == pytest.approx(96**-0.5)
    assert {d.window(layer) for layer in range(32)} == {2047}
    assert {d.rotary_kind(layer) for layer in range(32)} == {FULL}
    assert d.layer_units(0)["attn_in"].sources == ("model.layers.0.self_attn.qkv_proj",)
    assert d.rows(0, "v") == Rows("model.layers.0.self_attn.qkv_proj", 6144, 9216)
    assert d.rows(0, "up") == Rows("model.layers.0.mlp.gate_up_proj", 8192, 16384)
    assert d.input_norm(0, "mlp_in") == "model.layers.0.post_attention_layernorm"
    assert d.output_norm(0, "mlp_out") is None


def test_longrope_serves_the_context_of_its_short_factors() -> None:
    d = described("Phi-4-mini-instruct")
    assert d.context_length == 4096
    assert d.window(0) is None


def test_windows_of_other_families() -> None:
    assert {described("Mistral-7B-v0.1").window(layer) for layer in range(32)} == {4096}
    assert {described("Qwen2.5-7B-Instruct").window(layer) for layer in range(28)} == {None}
    some = described("Qwen2.5-7B-Instruct", use_sliding_window=True, sliding_window=1024, max_window_layers=20)
    assert [some.window(layer) for layer in (19, 20)] == [None, 1024]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "gemma-3-1b-it",
            {"architectures": ["Gemma3ForSequenceClassification"]},
            "Gemma3ForSequenceClassification is not supported; supported: LlamaForCausalLM .*Phi3ForCausalLM",
        ),
        ("gemma-3-1b-it", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("Phi-3-mini-4k-instruct", {"hidden_act": "relu"}, "hidden_act is 'relu'; only silu"),
        ("Phi-3-mini-4k-instruct", {"hidden_size": 3200}, "head_dim is 100; .*multiple of 16"),
        ("Qwen2.5-7B-Instruct", {"layer_types": ["chunked_attention"] * 28}, "chunked_attention"),
    ],
)
def test_refusals(name: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        described(name, **changes)


def test_the_table_of_the_docs_has_every_family_and_what_gpus_run() -> None:
    page = Path(__file__).parents[2] / "docs" / "export-options.md"
    rows = re.findall(r"^\|[^|]+\| (`[^|]+`) \|[^|]+\| (yes|no) \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    told = {name: gpus == "yes" for names, gpus in rows for name in re.findall(r"`(\w+)`", names)}
    found = {}
    for name in FAMILIES:
        config = AutoConfig.for_model(**{"model_type": name, **COMMON, **MODELS[name]})
        found[name] = not without_gpu_kernels(describe(config, name))
    assert told == found
