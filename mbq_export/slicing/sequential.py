"""Slices a model block by block, each block on the inputs that the sliced blocks before it produce.

The windows go through the sliced part at different depths in turn, so a block sees the inputs it will
see at every budget.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from mbq_runtime.profile import SliceProfile

from ..blocks import Blocks, Hidden, autocast, fast_dtype, require_finite, values_at, watching_inputs
from ..checkpoint import Checkpoint
from ..families import Unit
from ..store import Store
from . import nested
from .reference import F32, Sliced
from .refine import refine


def _hessians(
    checkpoint: Checkpoint, blocks: Blocks, layer: int, units: list[Unit], hidden: list[Hidden]
) -> dict[str, torch.Tensor]:
    """Mean of ``x x.T`` over the inputs that each unit sees inside the block, float64 [K, K] by unit name."""
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, x: torch.Tensor) -> None:
        with torch.autocast("cpu", enabled=False):
            sums[name] = sums.get(name, 0) + (x.float().T @ x.float()).double()

    with autocast(fast_dtype()), watching_inputs(checkpoint, {unit.name: unit.sources[0] for unit in units}, add):
        for window in hidden:
            blocks.run(layer, window)
    for name, total in sums.items():
        require_finite(name, total)
    tokens = sum(window.shape[1] for window in hidden)
    return {name: total / tokens for name, total in sums.items()}


def write_depth(checkpoint: Checkpoint, unit: Unit, sliced: Sliced, profile: SliceProfile, depth: int) -> None:
    """Put the unit's values at ``depth`` (1-based) into the checkpoint's layers."""
    values = values_at(sliced, profile, depth)
    with torch.no_grad():
        for layer, rows in checkpoint.layers(unit):
            layer.weight.copy_(values[rows])


def slice_model(
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    profile: SliceProfile,
    group_size: int,
    sweeps: int,
    store: Store,
    progress: Callable[[int, int], None],
) -> dict[str, Sliced]:
    """Nested slices of every unit by name; the blocks' layers end up holding values of their slices.

    windows: int64 [windows, context]; sweeps: of refinement.  Blocks that ``store`` already holds are taken from it.
    Raises ModelError for weights or activations that are not finite.
    """

    def sliced(weight: F32, hessian: torch.Tensor, name: str) -> Sliced:
        return refine(weight, hessian, nested.slice_weight(weight, hessian, group_size, profile, name), profile, sweeps)

    d = checkpoint.decoder
    blocks = Blocks(checkpoint, windows.shape[1])
    hidden = blocks.embed(windows)
    slices: dict[str, Sliced] = {}
    for layer in range(d.layers):
        units = list(d.layer_units(layer).values())
        found = store.get(d.block(layer))
        if found is None:
            hessians = _hessians(checkpoint, blocks, layer, units, hidden)
            found = {unit.name: sliced(checkpoint.weight(unit), hessians[unit.name], unit.name) for unit in units}
            store.put(d.block(layer), found)
        hidden = _advance(checkpoint, blocks, layer, units, found, hidden, profile)
        slices |= found
        progress(layer + 1, d.layers + 1)
    found = store.get("head")
    if found is None:
        inputs = torch.cat([blocks.final(window) for window in hidden])
        hessian = (inputs.T @ inputs).double() / len(inputs)
        found = {d.head.name: sliced(checkpoint.weight(d.head), hessian, d.head.name)}
        store.put("head", found)
    progress(d.layers + 1, d.layers + 1)
    return slices | found


def _advance(
    checkpoint: Checkpoint,
    blocks: Blocks,
    layer: int,
    units: list[Unit],
    found: dict[str, Sliced],
    hidden: list[Hidden],
    profile: SliceProfile,
) -> list[Hidden]:
    """The windows behind the sliced block, window i at depth ``i % depths + 1``."""
    after = list(hidden)
    for depth in range(1, profile.depths + 1):
        for unit in units:
            write_depth(checkpoint, unit, found[unit.name], profile, depth)
        for i in range(depth - 1, len(hidden), profile.depths):
            with autocast(fast_dtype()):
                after[i] = blocks.run(layer, hidden[i])
    return after
