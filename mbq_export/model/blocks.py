"""A decoder run block by block: all windows go through one block before the next block is touched.

So only one block needs its weights in fast memory, and the blocks before it may already be sliced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mbq_runtime.bundle.isa import this_machine
from mbq_runtime.errors import ModelError

from ..memory import KEPT_WEIGHT_BYTES, fast_bytes
from .checkpoint import Checkpoint
from .per_layer import given
from .shape import Unit


@cache
def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware, else float32.

    bfloat16 is twice as fast.  It is exact enough for gradients, for average inputs, and to compare routers.

    Args:
        device: where products are computed.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and fast_bytes() == 2
    return torch.bfloat16 if fast else torch.float32


def autocast(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """A context in which products are computed in ``dtype``.

    Args:
        dtype: bfloat16 or float32.
        device: where products are computed.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def fast_autocast(device: torch.device) -> torch.autocast:
    """A context in which products are computed in the device's ``fast_dtype``.

    Args:
        device: where products are computed.
    """
    return autocast(fast_dtype(device), device)


@contextmanager
def fast_passes(module: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Passes without gradients in the device's ``fast_dtype``, while the block runs.

    Weights must not change meanwhile.  They are cast once, if they are few enough to be kept: autocast keeps those that
    require a gradient.

    Args:
        module: what is run, several times.
        device: where products are computed.
    """
    weights = [linear.weight for linear in module.modules() if isinstance(linear, torch.nn.Linear)]
    if 4 * sum(weight.numel() for weight in weights) > KEPT_WEIGHT_BYTES:
        weights = []
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with torch.no_grad(), fast_autocast(device):
            yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)


@contextmanager
def fast_products(device: torch.device, *, wanted: bool = True) -> Iterator[None]:
    """Compute products of float32 in the device's ``fast_dtype`` while the block runs.  Their results are float32.

    Args:
        device: where products are computed.
        wanted: False leaves products as they are.
    """
    with _float32_products(device, fast=wanted and fast_dtype(device) == torch.bfloat16):
        yield


@contextmanager
def quick_exact_products() -> Iterator[None]:
    """Let oneDNN compute products of float32 while the block runs, where it computes them exactly: on x86 without AMX.

    PyTorch's other library, MKL, takes twice as long on processors of AMD (docs/log.md).  PyTorch asks oneDNN only for
    less precision than float32 has, and without AMX oneDNN has no such products.
    """
    machine = this_machine()
    with _float32_products(torch.device("cpu"), fast=machine.arch == "x86_64" and "amx_bf16" not in machine.features):
        yield


@contextmanager
def _float32_products(device: torch.device, fast: bool) -> Iterator[None]:
    """Permit a device's fastest products of float32, or leave them as they are, while the block runs."""
    backends: Any = torch.backends
    products, fastest = (backends.cuda.matmul, "tf32") if device.type == "cuda" else (backends.mkldnn.matmul, "bf16")
    before = products.fp32_precision
    if fast:
        products.fp32_precision = fastest
    try:
        yield
    finally:
        products.fp32_precision = before


@dataclass(frozen=True)
class Hidden:
    """One window of text between two blocks.

    stream: float32 [1, context, hidden_size], its residual stream.
    tokens: int64 [1, context].
    shared: keys and values that later blocks attend to again, by kind of layer, as transformers names them.
    """

    stream: torch.Tensor
    tokens: torch.Tensor
    shared: Mapping[str, Any]


class Blocks:
    """The blocks of a checkpoint's model, for windows of one length.

    Args:
        checkpoint: the model.
        context: tokens of every window.
    """

    def __init__(self, checkpoint: Checkpoint, context: int) -> None:
        self.checkpoint = checkpoint
        self.layers = checkpoint.model.model.layers
        self._arguments = self._observed_arguments(context)

    def _observed_arguments(self, context: int) -> list[dict[str, Any]]:
        """What the model passes to each block besides the residual stream: masks, positions, rotations."""
        seen: list[dict[str, Any]] = []

        def note(stream: torch.Tensor, *of_tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            seen.append(kwargs)
            return stream

        with ExitStack() as stack, torch.no_grad():
            for layer in self.layers:
                stack.enter_context(replaced_forward(layer, note))
            if width := self.checkpoint.decoder.per_layer_width:
                # Its weights are those of blocks, which may be released.
                projection = self.checkpoint.model.model.per_layer_model_projection
                stack.enter_context(replaced_forward(projection, lambda x: x.new_zeros(*x.shape[:-1], width)))
            tokens = torch.zeros(1, context, dtype=torch.long, device=self.checkpoint.device)
            self.checkpoint.model.model(tokens, use_cache=False)
        return seen

    def embed(self, windows: NDArray[np.int64]) -> list[Hidden]:
        """The residual stream before the first block.

        Args:
            windows: int64 [windows, context] tokens.
        """
        with torch.no_grad():
            embedding, tokens = self.checkpoint.model.get_input_embeddings(), self.checkpoint.on_device(windows)
            return [Hidden(embedding(window[None]), window[None], {}) for window in tokens]

    def run(self, layer: int, hidden: Hidden) -> Hidden:
        """Run one window through one block.

        Args:
            layer: index of the block, 0-based.
            hidden: the window in front of the block.
        """
        arguments, shared = dict(self._arguments[layer]), hidden.shared
        with torch.no_grad():
            if self.checkpoint.decoder.per_layer_size:
                arguments["per_layer_input"] = given(self.checkpoint.model, layer, hidden.tokens)
            if "shared_kv_states" in arguments:
                arguments["shared_kv_states"] = shared = type(arguments["shared_kv_states"])(shared)
            stream = self.layers[layer](hidden.stream, **arguments)
        return Hidden(stream, hidden.tokens, shared)

    def final(self, hidden: Hidden) -> torch.Tensor:
        """The head's input.

        Args:
            hidden: the window behind the last block.

        Returns:
            float32 [context, hidden_size].
        """
        final_norm = self.checkpoint.model.get_submodule(self.checkpoint.decoder.final_norm)
        with torch.no_grad():
            normed: torch.Tensor = final_norm(hidden.stream)[0]
        return normed


@contextmanager
def replaced_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the module's ``forward`` while the block runs.

    Args:
        module: the module to change.
        forward: what a call of the module runs.
    """
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]


@contextmanager
def watching_inputs(
    checkpoint: Checkpoint, modules: Mapping[str, str], see: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Watch the inputs of modules while the block runs.

    Args:
        checkpoint: the model.
        modules: names of modules in the model, by a key.
        see: called with the key and the input, [tokens, width], each time such a module runs.
    """
    with ExitStack() as hooks:
        for key, name in modules.items():

            def tell(_: torch.nn.Module, args: tuple[torch.Tensor], key: str = key) -> None:
                see(key, args[0].detach().reshape(-1, args[0].shape[-1]))

            hooks.enter_context(checkpoint.model.get_submodule(name).register_forward_pre_hook(tell))
        yield


def require_finite(name: str, values: torch.Tensor) -> None:
    """Refuse values that are NaN or infinite.

    Args:
        name: the unit or layer whose activations the values come from.
        values: any shape.

    Raises:
        ModelError: a value is not finite.
    """
    if not torch.isfinite(values).all():
        raise ModelError(f"{name}: the activations are NaN or infinite on the calibration text; the model is broken")


@contextmanager
def replaced(checkpoint: Checkpoint, unit: Unit, modules: list[torch.nn.Module]) -> Iterator[None]:
    """Replace the layers of a unit while the block runs.

    Args:
        checkpoint: the model.
        unit: the unit whose layers are replaced.
        modules: one for each layer, in the unit's order.
    """
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
