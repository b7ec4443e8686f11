"""Models for text and other media: their text part loads, and the rest is named and left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import COMMON, tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText

from mbq_export.model.loading import left_out, load
from mbq_export.model.source import locate
from mbq_runtime.errors import ModelError

pytestmark = pytest.mark.heavy

_VISION = {"hidden_size": 32, "intermediate_size": 64, "image_size": 28, "patch_size": 14}
_BLOCKS = {"num_hidden_layers": 1, "num_attention_heads": 2}
_QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 192}

WRAPPERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": ({"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}, {**_VISION, **_BLOCKS}),
    "mistral3": (
        {"model_type": "ministral3"},
        {"model_type": "pixtral", "head_dim": 16, **_VISION, **_BLOCKS},
    ),
    "qwen2_5_vl": ({"head_dim": None, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}, _QWEN_VISION),
    "qwen3_5": (
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 32,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e7,
                "partial_rotary_factor": 0.5,
                "mrope_section": [3, 3, 2],
                "mrope_interleaved": True,
            },
        },
        _QWEN_VISION,
    ),
    "qwen3_vl": (
        {"rope_scaling": {"rope_type": "default", "mrope_section": [8, 4, 4], "mrope_interleaved": True}},
        {**_QWEN_VISION, "deepstack_visual_indexes": [0]},
    ),
}
"""By model_type: what the text part and what the vision part have besides ``COMMON``."""


def write_wrapper(folder: Path, name: str) -> tuple[Path, Any]:
    """A random model in a folder, and transformers' object of it."""
    torch.manual_seed(0)
    text, vision = WRAPPERS[name]
    given = {key: value for key, value in {**COMMON, **text}.items() if value is not None}
    config = AutoConfig.for_model(name, text_config=given, vision_config=vision, tie_word_embeddings=name != "mistral3")
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder, model


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_text_part_says_what_the_model_says_of_text(name: str, tmp_path: Path) -> None:
    folder, model = write_wrapper(tmp_path / name, name)
    source, tokens = locate(str(folder)), torch.randint(0, 256, (1, 60))
    assert left_out(source) == ("vision",)
    checkpoint = load(source)
    assert torch.equal(logits(checkpoint.model, tokens), logits(model, tokens))
    assert checkpoint.decoder.tied is (name != "mistral3")


def test_float8_blocks_in_a_wrapper(tmp_path: Path) -> None:
    """As Ministral 3 is published: names of the whole model, and one scale beside each float8 weight."""
    folder, model = write_wrapper(tmp_path / "mistral3", "mistral3")
    weights, scale = load_file(folder / "model.safetensors"), torch.tensor(0.5)
    for name in [name for name in weights if name.endswith("_proj.weight") and "language_model" in name]:
        weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = scale.clone()
        weights[name.replace(".weight", ".activation_scale")] = scale.clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = {"quant_method": "fp8", "activation_scheme": "static"}
    config.save_pretrained(folder)
    tokens = torch.randint(0, 256, (1, 20))
    found, wanted = logits(load(locate(str(folder))).model, tokens), logits(model, tokens)
    assert 1e-4 < (found - wanted).norm() / wanted.norm() < 0.1


def test_a_wrapper_of_an_unknown_text_model_is_refused(tmp_path: Path) -> None:
    folder, _ = write_wrapper(tmp_path / "gemma3", "gemma3")
    config = (folder / "config.json").read_text().replace('"gemma3_text"', '"nothing_known"')
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match=r"the text part of Gemma3\w+ is 'nothing_known'.*supported: Llama") as raised:
        left_out(locate(str(folder)))
    assert "\n" not in str(raised.value)
