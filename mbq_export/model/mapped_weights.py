"""The float32 weights of a large model, in a file that is mapped into memory.

Mapped pages take memory only while there is some free, so a model may be larger than memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mbq_runtime.errors import ModelError

from .empty_model import empty_model, stored_buffers

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
    # Buffers such as Gemma's embedding scale were rounded to the dtype that ``loaded`` has; made anew they are exact.
    model = empty_model(loaded.config)
    model.generation_config = loaded.generation_config
    weights = dict(loaded.named_parameters())
    room = _room(sum(_aligned(weight.numel()) for weight in weights.values()), folder)
    start = 0
    for name, weight in weights.items():
        place = room[start : start + weight.numel()].view(weight.shape).copy_(weight.detach())
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, torch.nn.Parameter(place, requires_grad=False))
        start += _aligned(weight.numel())
    for name, buffer in stored_buffers(loaded):
        model.get_buffer(name).copy_(buffer)
    model.tie_weights()
    return model


def _aligned(elements: int) -> int:
    return -(-elements // _ALIGNMENT) * _ALIGNMENT


def arrays_in_file(arrays: Mapping[str, NDArray[np.generic]], folder: Path) -> dict[str, NDArray[np.generic]]:
    """The same arrays in a file, which has no name and disappears with the last of them.

    Args:
        arrays: by name, of any dtype.
        folder: where the file lies.

    Raises:
        ModelError: the folder has no room for them.
    """
    room = _mapped(sum(_aligned(array.nbytes) for array in arrays.values()), folder)
    start, found = 0, dict[str, NDArray[np.generic]]()
    for name, array in arrays.items():
        found[name] = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        found[name][...] = array
        start += _aligned(array.nbytes)
    return found


def _room(elements: int, folder: Path) -> torch.Tensor:
    """float32 [elements], in a new file."""
    return torch.from_numpy(_mapped(4 * elements, folder).view(np.float32))


def _mapped(size: int, folder: Path) -> NDArray[np.uint8]:
    """uint8 [size], in a new file."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            # Allocate the whole file now.  A write to a mapped page on a full disk would kill the process.
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise ModelError(
                f"{folder}: {size >> 20} MB for the model's weights cannot be had ({error.strerror}); "
                "free some space or choose another --output"
            ) from None
        return np.memmap(file, np.uint8, "r+", shape=(size,))
