"""The float32 weights of a large model, in a file that is mapped into memory.

Mapped pages take memory only while there is some free, so a model may be larger than memory.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mbq_runtime.errors import ModelError

_ALIGNMENT = 64
"""Elements.  Each weight starts at a multiple of a cache line and of every vector register."""


def in_file(loaded: Any, folder: Path) -> Any:
    """The same model in float32, with its weights in a file.

    The file has no name.  It disappears with its last weight, and also when the process is killed.

    Args:
        loaded: a transformers model of any dtype.
        folder: where the file lies; it is made if it does not exist.

    Raises:
        ModelError: the folder has no room for 4 bytes per weight.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    # Buffers such as Gemma's embedding scale were rounded to the dtype that ``loaded`` has; made anew they are exact.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    model.generation_config = loaded.generation_config
    weights = dict(loaded.named_parameters())
    room = _room(sum(_aligned(weight.numel()) for weight in weights.values()), folder)
    start = 0
    for name, weight in weights.items():
        place = room[start : start + weight.numel()].view(weight.shape).copy_(weight.detach())
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, torch.nn.Parameter(place, requires_grad=False))
        start += _aligned(weight.numel())
    model.tie_weights()
    return model


def _aligned(elements: int) -> int:
    return -(-elements // _ALIGNMENT) * _ALIGNMENT


def _room(elements: int, folder: Path) -> torch.Tensor:
    """float32 [elements], in a new file."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            # Allocate the whole file now.  A write to a mapped page on a full disk would kill the process.
            os.posix_fallocate(file.fileno(), 0, 4 * elements)
        except OSError as error:
            raise ModelError(
                f"{folder}: {4 * elements >> 20} MB for the model's weights cannot be had ({error.strerror}); "
                "free some space or choose another --output"
            ) from None
        return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=(elements,)))
