"""Other weights in the same model, and the plainest way to make them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mbq_export.model.checkpoint import Checkpoint
from mbq_runtime.engine import Window

from .harness import Forward

HALF_BYTES = 2
"""Of a float16: what published files keep a scale, and the weights they leave alone, in."""


@dataclass(frozen=True)
class Layers:
    """The names of a checkpoint's linear layers.  head: apart, for most methods leave it as it is."""

    blocks: tuple[str, ...]
    head: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Layers:
        head = checkpoint.decoder.head.sources[0]
        named = checkpoint.model.named_modules()
        return cls(tuple(n for n, m in named if isinstance(m, torch.nn.Linear) and n != head), head)


def count(checkpoint: Checkpoint, names: Sequence[str]) -> int:
    """Weights in the linear layers of these names."""
    return sum(checkpoint.linear(name).weight.numel() for name in names)


@contextmanager
def swapped(checkpoint: Checkpoint, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within the context the named modules of the checkpoint hold ``weights``, each [N, K]; then their own again."""
    kept = {name: checkpoint.model.get_submodule(name).weight.data for name in weights}
    try:
        for name, weight in weights.items():
            checkpoint.model.get_submodule(name).weight.data = weight.to(kept[name])
        yield
    finally:
        for name, weight in kept.items():
            checkpoint.model.get_submodule(name).weight.data = weight


def forward(checkpoint: Checkpoint, bits: float) -> Forward:
    """The model as it stands when it is called."""

    def run(tokens: Sequence[int]) -> Window:
        with torch.no_grad():
            logits = checkpoint.model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
        return Window(logits.numpy(), bits)

    return run


def round_to_nearest(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """float32 [N, K] rounded to ``2**bits`` levels between each group's ends, zero among them.

    The scale is a float16 and the zero an integer of ``bits`` bits, as files of this kind have it.
    """
    groups = weight.reshape(weight.shape[0], -1, group_size)
    top = 2**bits - 1
    low = groups.amin(dim=2, keepdim=True).clamp(max=0)
    high = groups.amax(dim=2, keepdim=True).clamp(min=0)
    scale = ((high - low) / top).half().float().clamp(min=1e-7)
    zero = (-low / scale).round().clamp(0, top)
    codes = ((groups / scale).round() + zero).clamp(0, top)
    rounded: torch.Tensor = ((codes - zero) * scale).reshape(weight.shape)
    return rounded


def rounded_bytes(weights: int, bits: int, group_size: int) -> int:
    """Bytes of that many weights: codes, and a float16 scale and a zero of ``bits`` bits for each group."""
    return weights * bits // 8 + weights // group_size * (8 * HALF_BYTES + bits) // 8
