"""Puts other weights into a model, and rounds weights to nearest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mbq_export.model.checkpoint import Checkpoint
from mbq_runtime.engine import Window

from .harness import Forward

HALF_BYTES = 2
"""Bytes of a float16, in which published files store scales and weights that are not quantised."""


@dataclass(frozen=True)
class Layers:
    """Names of a model's linear layers.

    blocks: those of all blocks; head: the one that makes logits, which most methods do not quantise.
    """

    blocks: tuple[str, ...]
    head: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Layers:
        """The layers of a model.

        Args:
            checkpoint: the model.
        """
        d = checkpoint.decoder
        head = d.head.sources[0]
        others = {head, *(d.chooser(layer) for layer in range(d.layers))}
        named = checkpoint.model.named_modules()
        return cls(tuple(n for n, m in named if isinstance(m, torch.nn.Linear) and n not in others), head)


def count(checkpoint: Checkpoint, names: Sequence[str]) -> int:
    """The number of weights in linear layers that one token reads: of experts, those of as many as it takes.

    Args:
        checkpoint: the model.
        names: the layers.
    """
    whole = sum(checkpoint.linear(name).weight.numel() for name in names)
    d = checkpoint.decoder
    if d.experts is None:
        return whole
    blocks = (d.expert_layers(layer) for layer in range(d.layers) if "experts" in d.branches(layer))
    of_experts = {name for block in blocks for layers in block for name in layers}.intersection(names)
    size = sum(checkpoint.linear(name).weight.numel() for name in of_experts)
    return whole - size + size * d.experts.used // d.experts.count


@contextmanager
def swapped(checkpoint: Checkpoint, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Put other weights into a model while the block runs.

    Args:
        checkpoint: the model.
        weights: [N, K] by the name of the module.
    """
    kept = {name: checkpoint.model.get_submodule(name).weight.data for name in weights}
    try:
        for name, weight in weights.items():
            checkpoint.model.get_submodule(name).weight.data = weight.to(kept[name])
        yield
    finally:
        for name, weight in kept.items():
            checkpoint.model.get_submodule(name).weight.data = weight


@contextmanager
def head_swapped(checkpoint: Checkpoint, weight: torch.Tensor) -> Iterator[None]:
    """Put another head into a model while the block runs.  A tied embedding stays.

    Args:
        checkpoint: the model.
        weight: float32 [N, K].
    """
    head = checkpoint.linear(checkpoint.decoder.head.sources[0])
    kept = head.weight
    head.weight = torch.nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        head.weight = kept


def forward(checkpoint: Checkpoint, bits: float) -> Forward:
    """The model with the weights that it has when it is called.

    Args:
        checkpoint: the model.
        bits: average bits per weight, for the results.
    """

    def run(tokens: Sequence[int]) -> Window:
        with torch.no_grad():
            logits = checkpoint.model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
        return Window(logits.numpy(), bits)

    return run


def round_to_nearest(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """Round weights to ``2**bits`` levels between the ends of each group.  Zero is one of the levels.

    The scale is a float16 and the zero point an integer of ``bits`` bits, as in the files of published methods.

    Args:
        weight: float32 [N, K].
        bits: bits per weight.
        group_size: weights per scale.
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
    """The bytes of rounded weights: codes, and for each group a float16 scale and a zero point of ``bits`` bits.

    Args:
        weights: number of weights.
        bits: bits per weight.
        group_size: weights per scale.
    """
    return weights * bits // 8 + weights // group_size * (8 * HALF_BYTES + bits) // 8
