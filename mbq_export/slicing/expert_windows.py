"""Which windows of a text experts are measured on: those that give tokens to experts that have few.

A token takes a few experts of many.  So some experts see few tokens of evenly spread windows.  Experts that are
measured on few tokens are rounded (``expert_inputs``).
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from .. import processes
from ..model.blocks import Blocks, watching_inputs
from ..model.checkpoint import Checkpoint
from ..progress import StageReport

ENOUGH_TOKENS = 256
"""More tokens of an expert do not count.  Measurements are in docs/log.md."""


def balanced_windows(
    checkpoint: Checkpoint, windows: NDArray[np.int64], count: int, progress: StageReport
) -> NDArray[np.int64]:
    """Choose windows by what the experts of the model see of them.

    Args:
        checkpoint: the model, as it was loaded.
        windows: int64 [windows, context] tokens, more than ``count``.
        count: how many are chosen.
        progress: told how many blocks are done.

    Returns:
        int64 [count, context], in their order in the text.
    """
    return windows[choose(expert_tokens(checkpoint, windows, progress), count)]


def expert_tokens(checkpoint: Checkpoint, windows: NDArray[np.int64], progress: StageReport) -> NDArray[np.int64]:
    """How many tokens of each window choose each expert, int64 [windows, experts of all blocks].

    Args:
        checkpoint: the model, as it was loaded.
        windows: int64 [windows, context] tokens.
        progress: told how many blocks are done.
    """
    d, own = checkpoint.decoder, processes.share(len(windows))
    assert d.experts is not None
    layers = [layer for layer in range(d.layers) if "experts" in d.branches(layer)]
    counts = torch.zeros(len(windows), len(layers), d.experts.count, dtype=torch.int64)
    blocks = Blocks(checkpoint, windows.shape[1])
    streams = blocks.embed(windows[own])
    for layer in range(layers[-1] + 1):
        names = d.expert_layers(layer)[0] if layer in layers else ()
        for at, window in enumerate(range(*own.indices(len(windows)))):
            seen = dict.fromkeys(names, 0)
            with watching_inputs(checkpoint, {name: name for name in names}, partial(_count, seen)):
                streams[at] = blocks.run(layer, streams[at])
            if seen:
                counts[window, layers.index(layer)] = torch.tensor([*seen.values()])
        progress(layer + 1, layers[-1] + 1)
    return processes.summed(counts).flatten(1).numpy()


def _count(seen: dict[str, int], name: str, x: torch.Tensor) -> None:
    seen[name] += len(x)


def choose(counts: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Choose windows one by one, each time the one that adds most to the worth of all experts' tokens.

    The worth of an expert's tokens is the square root of their number, up to ``ENOUGH_TOKENS``: the first count most.

    Args:
        counts: int64 [windows, experts], tokens.
        count: how many windows are chosen.

    Returns:
        int64 [count], rising.
    """

    def worth(tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray(np.sqrt(np.minimum(tokens, ENOUGH_TOKENS)).sum(-1))

    seen, chosen = np.zeros(counts.shape[1], np.int64), list[int]()
    for _ in range(count):
        gains = worth(seen + counts) - worth(seen)
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
        seen += counts[chosen[-1]]
    return np.sort(np.array(chosen, np.int64))
