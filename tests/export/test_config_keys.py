"""A key of a config that changes what a model computes is read by its description, or refused."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import COMMON, MODELS, write_checkpoint
from transformers import AutoConfig, PreTrainedConfig

from mbq_export.model.config_keys import ConfigKeys
from mbq_export.model.describe import describe
from mbq_export.model.families import FAMILIES
from mbq_export.model.loading import read_config
from mbq_export.model.source import locate
from mbq_runtime.errors import ModelError

CONFIGURATION = """
from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

@strict
class NewConfig(LlamaConfig):
    output_gate: bool = False
"""
MODELING = """
class NewModel:
    def __init__(self, config):
        self.cap = getattr(config, "value_cap", None)
"""


def config_of(name: str, **changes: object) -> Any:
    return AutoConfig.for_model(**{"model_type": name, **COMMON, **MODELS[name], **changes})


@pytest.mark.parametrize("name", MODELS)
def test_every_tiny_model_is_read_whole(name: str) -> None:
    assert describe(config_of(name), name).layers == config_of(name).num_hidden_layers


def test_every_family_has_a_tiny_model() -> None:
    assert FAMILIES.keys() <= {str(changes.get("model_type", name)) for name, changes in MODELS.items()}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; a gemma3_text model"),
        ("granitemoehybrid", {"num_local_experts": 4}, "num_local_experts is 4"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "a token takes 9 of 8 experts; needed: 1 to all of them"),
        ("qwen3_moe", {"num_experts_per_tok": 0}, "a token takes 0 of 8 experts; needed: 1 to all of them"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'"),
        ("gemma4_text", {"vocab_size_per_layer_input": 100}, "vocab_size_per_layer_input is 100, vocab_size is 264"),
        ("gemma4_text", {"per_layer_config": {0: {"intermediate_size": 64}}}, "per_layer_config.intermediate_size is"),
        ("gemma4_text", {"per_layer_config": {0: {"skip": ["mlp"]}}}, "per_layer_config.skip is"),
        ("gemma4_text", {"num_kv_shared_layers": 3}, "num_kv_shared_layers is 3; then no layer of kind full_attention"),
        ("granitemoehybrid", {"layer_types": ["attention", "mamba"]}, "layers of kind"),
        ("qwen3", {"layer_types": ["linear_attention"] * 2}, "layers of kind linear_attention"),
        (
            "qwen3_5_text",
            {"linear_value_head_dim": 24},
            "linear_value_head_dim is 24; the kernels need a multiple of 16",
        ),
        ("qwen3_5_text", {"hidden_act": "gelu_pytorch_tanh"}, "layers of linear attention need silu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1}},
            r"rope_parameters.llama_4_scaling_beta is 0.1",
        ),
    ],
)
def test_what_no_lowering_knows_is_refused(name: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message) as raised:
        describe(config_of(name, **changes), name)
    assert "\n" not in str(raised.value)


def test_keys_of_a_class_and_of_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new class is looked at as transformers has it: no list names its keys."""
    (tmp_path / "newfamily").mkdir()
    (tmp_path / "newfamily" / "__init__.py").touch()
    (tmp_path / "newfamily" / "configuration_new.py").write_text(CONFIGURATION)
    (tmp_path / "newfamily" / "modeling_new.py").write_text(MODELING)
    monkeypatch.syspath_prepend(tmp_path)
    made = importlib.import_module("newfamily.configuration_new").NewConfig
    try:
        assert not unread(made())
        assert unread(made(output_gate=True)) == {"output_gate": True}  # the class declares it
        assert unread(made(value_cap=5.0)) == {"value_cap": 5.0}  # the source names it
        assert not unread(made(colour="red"))  # nobody reads it
    finally:
        for module in [module for module in sys.modules if module.startswith("newfamily")]:
            del sys.modules[module]


def unread(config: Any) -> dict[str, Any]:
    keys = ConfigKeys(config)
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
        keys.get(key)
    return dict(keys.unread())


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_capped_where_transformers_caps_them(name: str) -> None:
    """Some classes name the key and cap nothing.  The code of the attention says which ones do."""
    config = config_of(name, attn_logit_softcapping=50.0)
    modeling = type(config).__module__.replace("configuration_", "modeling_")
    source = Path(importlib.import_module(modeling).__file__ or "").read_text(encoding="utf-8")
    caps = "softcap=self.attn_logit_softcapping" in source
    try:
        capped = describe(config, name).attention_cap
    except ModelError:
        capped = None
    assert capped == (50.0 if caps else None)


def test_a_key_that_transformers_ignores_is_ignored() -> None:
    assert describe(config_of("llama", residual_multiplier=0.5), "llama").branch_scale == 1


def test_an_unknown_family_of_the_hub_is_refused_by_its_config_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def told(name: str) -> tuple[dict[str, object], dict[str, object]]:
        asked.append(name)
        return {"model_type": "new", "architectures": ["NewForCausalLM"]}, {}

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", told)
    message = r"^model: architecture NewForCausalLM is not supported; supported: LlamaForCausalLM .*Lfm3ForCausalLM"
    with pytest.raises(ModelError, match=message) as raised:
        read_config(locate("somebody/model"))
    assert "\n" not in str(raised.value)
    assert asked == ["somebody/model"]


def test_a_known_family_without_a_lowering_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    """Also if its weights are already quantised, as those of gpt-oss are: there are no others."""
    folder = write_checkpoint(tmp_path / "model", "llama")
    config = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    message = (
        "GptOssForCausalLM is not supported: attention sinks, and experts with biases and a clamped gate have no "
        "lowering; supported: LlamaForCausalLM"
    )
    with pytest.raises(ModelError, match=message) as raised:
        read_config(locate(str(folder)))
    assert "\n" not in str(raised.value)
