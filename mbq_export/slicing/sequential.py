"""Slices a model block by block, each block on the inputs that the sliced blocks before it produce.

The windows go through the sliced part at different depths in turn, so a block sees the inputs it will
see at every budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from mbq_runtime.errors import ModelError
from mbq_runtime.profile import SliceProfile

from ..blocks import Blocks, Hidden
from ..checkpoint import Checkpoint
from ..families import Unit
from ..store import Store
from . import nested
from .reference import Sliced, decode_f32


@contextmanager
def _hessians(checkpoint: Checkpoint, units: list[Unit]) -> Iterator[dict[str, torch.Tensor]]:
    """Mean of ``x x.T`` over the inputs that each unit sees inside the block, float64 [K, K] by unit name."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    handles = []
    for unit in units:

        def add(_: torch.nn.Module, args: tuple[torch.Tensor], name: str = unit.name) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            sums[name] = sums.get(name, 0) + (x.T @ x).double()
            counts[name] = counts.get(name, 0) + len(x)

        handles.append(checkpoint.linear(unit.sources[0]).register_forward_pre_hook(add))
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise ModelError(f"{name}: activations are NaN or infinite on the calibration text; the model is broken")
        total /= counts[name]


def write_depth(checkpoint: Checkpoint, unit: Unit, sliced: Sliced, profile: SliceProfile, depth: int) -> None:
    """Put the unit's values at ``depth`` (1-based) into the checkpoint's layers."""
    values = torch.from_numpy(decode_f32(sliced, profile, depth))
    layers = [checkpoint.linear(name) for name in unit.sources]
    with torch.no_grad():
        for layer, rows in zip(layers, values.split([layer.out_features for layer in layers]), strict=True):
            layer.weight.copy_(rows)


def slice_model(
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    profile: SliceProfile,
    group_size: int,
    store: Store,
    progress: Callable[[int, int], None],
) -> dict[str, Sliced]:
    """Nested slices of every unit by name; the checkpoint ends up holding their deepest values.

    windows: int64 [windows, context].  Blocks that ``store`` already holds are taken from it.
    Raises ModelError for weights or activations that are not finite.
    """
    d = checkpoint.decoder
    blocks = Blocks(checkpoint, windows.shape[1])
    hidden = blocks.embed(windows)
    slices: dict[str, Sliced] = {}
    for layer in range(d.layers):
        units = list(d.layer_units(layer).values())
        found = store.get(d.block(layer))
        if found is None:
            with _hessians(checkpoint, units) as hessians:
                for window in hidden:
                    blocks.run(layer, window)
            found = {
                unit.name: nested.slice_weight(
                    checkpoint.weight(unit), hessians[unit.name], group_size, profile, unit.name
                )
                for unit in units
            }
            store.put(d.block(layer), found)
        hidden = _advance(checkpoint, blocks, layer, units, found, hidden, profile)
        slices |= found
        progress(layer + 1, d.layers + 1)
    found = store.get("head")
    if found is None:
        inputs = torch.cat([blocks.final(window) for window in hidden])
        hessian = (inputs.T @ inputs).double() / len(inputs)
        weight = checkpoint.weight(d.head)
        found = {d.head.name: nested.slice_weight(weight, hessian, group_size, profile, d.head.name)}
        store.put("head", found)
    write_depth(checkpoint, d.head, found[d.head.name], profile, profile.depths)
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
            after[i] = blocks.run(layer, hidden[i])
    return after
