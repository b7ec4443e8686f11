"""A model of a config, without its weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .experts import with_single_experts


def empty_model(config: Any) -> Any:
    """The model of a config, in float32.  Only its parameters are empty: buffers are computed from the config.

    Experts are modules of their own.

    Args:
        config: transformers' config of a model of text.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        return with_single_experts(model)


def stored_buffers(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that a checkpoint holds beside the parameters, by name.  Other buffers follow from the config.

    Args:
        model: a transformers model.
    """
    kept = model.state_dict().keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name in kept)
