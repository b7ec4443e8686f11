"""Text parts of models for text and other media: their config and their weights, without what reads images."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mbq_runtime.errors import ModelError

from .families import FAMILIES, WRAPPERS, check_family, supported

_SAME_AS = {"qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Text parts that compute of a text what another family computes.  Their rotations have a position for each axis of an
image; for text all axes have the same."""

_AXES = ("mrope_section", "mrope_interleaved")

RENAMED = {
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^model\.language_model\.": "model.",
}
"""Names of weights in a wrapper's files, as patterns, and what they are in its text part."""

_LEFT_OUT = re.compile(
    r"^(model\.)?(vision_tower|audio_tower|embed_vision|embed_audio|multi_modal_projector|visual|mtp)\."
)
"""Weights of other media, and those that guess the next tokens but one."""


def check_wrapper(values: Mapping[str, Any], where: str) -> None:
    """Refuse a model of a family that has no lowering, by its config.json alone.

    Args:
        values: the config, as config.json has it.
        where: the model's name, for errors.

    Raises:
        ModelError: as said.
    """
    model_type, architectures = values.get("model_type"), values.get("architectures")
    if model_type in WRAPPERS and architectures in (None, [], [WRAPPERS[model_type]]):
        text = values.get("text_config") or {}
        of_text = text.get("model_type") if isinstance(text, Mapping) else None
        if of_text is not None and _SAME_AS.get(of_text, of_text) not in FAMILIES:
            raise ModelError(
                f"{where}: the text part of {WRAPPERS[model_type]} is {of_text!r}, which is not supported; "
                f"supported: {supported()}"
            )
    elif isinstance(model_type, str):
        check_family(model_type, architectures, where)


def text_part(config: Any) -> tuple[Any, tuple[str, ...]]:
    """The config of the text part.

    Args:
        config: transformers' config of a model.

    Returns:
        The same config and nothing for a model of text alone.  Else the text part's config, as that of a family of
        text, and the names of the parts that are left out.
    """
    from transformers import AutoConfig

    if config.model_type not in WRAPPERS:
        return config, ()
    values = config.get_text_config().to_dict()
    model_type = values.pop("model_type")
    family = FAMILIES[_SAME_AS.get(model_type, model_type)]
    rope = values.get("rope_parameters") or {}
    values["rope_parameters"] = {key: value for key, value in rope.items() if key not in _AXES}
    values |= {"architectures": [family.architecture], "tie_word_embeddings": config.tie_word_embeddings}
    text = AutoConfig.for_model(family.model_type, **values)
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        text.quantization_config = quantization
    return text, tuple(sorted(key.removesuffix("_config") for key in config.sub_configs if key != "text_config"))


def renamed(name: str) -> str:
    """The name of a weight in the text part.

    Args:
        name: in a checkpoint's file.
    """
    for pattern, replacement in RENAMED.items():
        name = re.sub(pattern, replacement, name)
    return name


def is_left_out(name: str) -> bool:
    """Whether a weight belongs to what is left out.

    Args:
        name: in a checkpoint's file.
    """
    return _LEFT_OUT.match(name) is not None
