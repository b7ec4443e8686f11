"""A decoder run block by block, with all windows going through one block before the next is touched.

Only the block at hand needs its weights in fast memory, and what comes before it may already be sliced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.checkpoint import checkpoint as recomputed

from mbq_runtime.errors import ModelError

from ..memory import KEPT_ACTIVATION_BYTES, activation_bytes, fast_bytes
from .checkpoint import Checkpoint
from .families import Unit


@cache
def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware: twice as fast, and exact enough for gradients, for
    what inputs are like on average, and for telling routers apart.  Else float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and fast_bytes() == 2
    return torch.bfloat16 if fast else torch.float32


def autocast(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Products in ``dtype``, bfloat16 or float32, while the block runs."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def fast(device: torch.device) -> torch.autocast:
    """Products in the device's ``fast_dtype`` while the block runs."""
    return autocast(fast_dtype(device), device)


Hidden = torch.Tensor
"""float32 [1, context, hidden_size]: one window's residual stream."""


class Blocks:
    """The blocks of a checkpoint's model for windows of ``context`` tokens, all of the same length."""

    def __init__(self, checkpoint: Checkpoint, context: int) -> None:
        self.checkpoint = checkpoint
        self.layers = checkpoint.model.model.layers
        self._arguments = self._observed_arguments(context)

    def _observed_arguments(self, context: int) -> list[dict[str, Any]]:
        """What the model hands to each block besides the residual stream: masks, positions, rotations."""
        seen: list[dict[str, Any]] = []

        def note(hidden: Hidden, **kwargs: Any) -> Hidden:
            seen.append(kwargs)
            return hidden

        with ExitStack() as stack, torch.no_grad():
            for layer in self.layers:
                stack.enter_context(_forward_is(layer, note))
            tokens = torch.zeros(1, context, dtype=torch.long, device=self.checkpoint.device)
            self.checkpoint.model.model(tokens, use_cache=False)
        return seen

    def embed(self, windows: NDArray[np.int64]) -> list[Hidden]:
        """int64 [windows, context] tokens -> the residual stream in front of the first block."""
        with torch.no_grad():
            embedding, tokens = self.checkpoint.model.get_input_embeddings(), self.checkpoint.on_device(windows)
            return [embedding(window[None]) for window in tokens]

    def run(self, layer: int, hidden: Hidden) -> Hidden:
        """One window through block ``layer``."""
        with torch.no_grad():
            output: Hidden = self.layers[layer](hidden, **self._arguments[layer])
        return output

    def final(self, hidden: Hidden) -> torch.Tensor:
        """float32 [context, hidden_size]: the head's input."""
        with torch.no_grad():
            normed: torch.Tensor = self.checkpoint.model.model.norm(hidden)[0]
        return normed


@contextmanager
def _forward_is(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While the block runs, a call of ``module`` is one of ``forward``."""
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]


@contextmanager
def lean_backward(checkpoint: Checkpoint) -> Iterator[None]:
    """For backward passes through all blocks: where a window's activations would take more than
    ``KEPT_ACTIVATION_BYTES``, a block keeps its input alone and is run again when its turn comes."""
    with ExitStack() as stack:
        if activation_bytes(checkpoint.decoder) > KEPT_ACTIVATION_BYTES:
            for layer in checkpoint.model.model.layers:
                # Nothing in a block is random.
                again = partial(recomputed, layer.forward, use_reentrant=False, preserve_rng_state=False)
                stack.enter_context(_forward_is(layer, again))
        yield


@contextmanager
def watching_inputs(
    checkpoint: Checkpoint, modules: Mapping[str, str], see: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """While the block runs, ``see`` is given the key and the input, [tokens, width], of each module that runs.

    modules: names in the checkpoint, by key.
    """
    with ExitStack() as hooks:
        for key, name in modules.items():

            def tell(_: torch.nn.Module, args: tuple[torch.Tensor], key: str = key) -> None:
                see(key, args[0].detach().reshape(-1, args[0].shape[-1]))

            hooks.enter_context(checkpoint.model.get_submodule(name).register_forward_pre_hook(tell))
        yield


def require_finite(name: str, values: torch.Tensor) -> None:
    """Raises ModelError when what was made of the activations of unit ``name`` is not finite."""
    if not torch.isfinite(values).all():
        raise ModelError(f"{name}: the activations are NaN or infinite on the calibration text; the model is broken")


@contextmanager
def replaced(checkpoint: Checkpoint, unit: Unit, modules: list[torch.nn.Module]) -> Iterator[None]:
    """The unit's layers, in order, stand aside for ``modules`` while the block runs."""
    places = []
    try:
        for name, module in zip(unit.sources, modules, strict=True):
            parent_name, _, attribute = name.rpartition(".")
            parent = checkpoint.model.get_submodule(parent_name)
            places.append((parent, attribute, getattr(parent, attribute)))
            setattr(parent, attribute, module)
        yield
    finally:
        for parent, attribute, old in places:
            setattr(parent, attribute, old)
