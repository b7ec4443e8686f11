"""Slices a model block by block, each block on the inputs that the sliced blocks before it produce.

The windows go through the sliced part at different depths in turn, so a block sees the inputs it will
see at every budget.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from mbq_runtime.bundle.slice_profile import SliceProfile

from .. import processes
from ..format.codes import F32, Sliced, joined
from ..memory import WEIGHTS_AT_ONCE
from ..model.blocks import Blocks, Hidden, fast, require_finite, watching_inputs
from ..model.checkpoint import Checkpoint
from ..model.families import Unit
from ..model.sliced_linear import row_ranges, values_at
from ..store import Store
from . import nested
from .importance import Importance
from .refine import refine


def _hessians(
    checkpoint: Checkpoint,
    blocks: Blocks,
    layer: int,
    units: list[Unit],
    hidden: list[Hidden],
    importance: Importance,
    windows: slice,
) -> dict[str, torch.Tensor]:
    """Mean of ``x x.T``, weighted by importance, over the inputs that each layer sees inside the block.

    windows: which those in ``hidden`` are.  float64 [K, K] by the layer's name.
    """
    sums: dict[str, torch.Tensor] = {}
    sources = {unit.name: unit.sources for unit in units}

    def add(name: str, x: torch.Tensor) -> None:
        with torch.autocast(x.device.type, enabled=False):
            for source in sources[name]:
                sums[source] = sums.get(source, 0) + _weighted_square(x, importance[source][windows][at])

    first = {unit.name: unit.sources[0] for unit in units}
    with fast(checkpoint.device), watching_inputs(checkpoint, first, add):
        for at, window in enumerate(hidden):  # noqa: B007 -- read by ``add``
            blocks.run(layer, window)
    for name, total in sums.items():
        require_finite(name, processes.summed(total))
    tokens = next(iter(importance.values())).size
    return {name: total.div_(tokens) for name, total in sums.items()}


def _weighted_square(x: torch.Tensor, weights: NDArray[np.float32]) -> torch.Tensor:
    """[tokens, K] and float32 [tokens] -> float64 [K, K]."""
    weighted = x.float() * torch.from_numpy(weights).to(x.device).sqrt()[:, None]
    return (weighted.T @ weighted).double()


def write_depth(checkpoint: Checkpoint, unit: Unit, sliced: Sliced, profile: SliceProfile, depth: int) -> None:
    """Put the unit's values at ``depth`` (1-based) into the checkpoint's layers."""
    values = values_at(sliced, profile, depth, device=checkpoint.device)
    with torch.no_grad():
        for layer, rows in checkpoint.layers(unit):
            layer.weight.copy_(values[rows])


Slicing = Callable[[str, slice, F32, torch.Tensor], Sliced]
"""Slices of a layer's weight: its name, rows, their weights float32 [rows, K], and its second moments [K, K]."""


def slice_model(
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    importance: Importance,
    profile: SliceProfile,
    group_size: int,
    sweeps: int,
    keep_weights: bool,
    store: Store,
    progress: Callable[[int, int], None],
) -> dict[str, Sliced]:
    """Nested slices of every unit by name.

    windows: int64 [windows, context]; importance: of their tokens, by layer; sweeps: of refinement; keep_weights: or
    else the checkpoint's weights are released as their slices are made.  Blocks that ``store`` already holds are
    taken from it.
    Raises ModelError for weights or activations that are not finite.
    """

    def sliced(name: str, rows: slice, weight: F32, hessian: torch.Tensor) -> Sliced:
        fed_back = nested.slice_weight(weight, hessian, group_size, profile, name)
        return refine(weight, hessian, fed_back, profile, sweeps)

    return _by_blocks(checkpoint, windows, importance, profile, sliced, keep_weights, "{}", store, progress)


def choose_residuals(
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    importance: Importance,
    slices: dict[str, Sliced],
    profile: SliceProfile,
    sweeps: int,
    store: Store,
    progress: Callable[[int, int], None],
) -> dict[str, Sliced]:
    """The same scales, offsets and base slices, with the residual slices chosen anew for them.

    The checkpoint's weights, which ``slice_model`` has kept, are released as this is done.  Arguments and errors are
    those of ``slice_model``.
    """
    by_layer = {
        name: slices[unit.name].rows(rows)
        for unit in checkpoint.decoder.units()
        for name, (_, rows) in zip(unit.sources, checkpoint.layers(unit), strict=True)
    }

    def sliced(name: str, rows: slice, weight: F32, hessian: torch.Tensor) -> Sliced:
        earlier, kept_bits = by_layer[name].rows(rows), profile.min_bits
        fed_back = nested.slice_weight(weight, hessian, earlier.group_size, profile, name, earlier, kept_bits)
        return refine(weight, hessian, fed_back, profile, sweeps, kept_bits)

    return _by_blocks(checkpoint, windows, importance, profile, sliced, False, "{}.residuals", store, progress)


def _by_blocks(
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    importance: Importance,
    profile: SliceProfile,
    slicing: Slicing,
    keep_weights: bool,
    step: str,
    store: Store,
    progress: Callable[[int, int], None],
) -> dict[str, Sliced]:
    """step: the name of a block's step in the store, with ``{}`` for the block's."""

    def sliced(unit: Unit, hessians: dict[str, torch.Tensor]) -> Sliced:
        parts = []
        for name in unit.sources:
            whole, hessian = checkpoint.linear(name).weight.detach().cpu().numpy(), hessians.pop(name)
            ranges = row_ranges(whole.shape, WEIGHTS_AT_ONCE, processes.share(len(whole)))
            parts += processes.gathered(slicing(name, rows, whole[rows], hessian) for rows in ranges)
        return joined(parts)

    d = checkpoint.decoder
    blocks = Blocks(checkpoint, windows.shape[1])
    own = processes.share(len(windows))
    hidden = blocks.embed(windows[own])
    slices: dict[str, Sliced] = {}
    for layer in range(d.layers):
        units = list(d.layer_units(layer).values())
        this_step = step.format(d.block(layer))
        found = store.get(this_step)
        if found is None:
            hessians = _hessians(checkpoint, blocks, layer, units, hidden, importance, own)
            found = store.put(this_step, {unit.name: sliced(unit, hessians) for unit in units})
        linears = [checkpoint.linear(name) for unit in units for name in unit.sources]
        weights = [linear.weight.detach().clone() for linear in linears] if keep_weights else []
        hidden = _advance(checkpoint, blocks, layer, units, found, hidden, profile, own.start)
        slices |= found
        if keep_weights:
            with torch.no_grad():
                for linear, weight in zip(linears, weights, strict=True):
                    linear.weight.copy_(weight)
        else:
            for unit in units:
                checkpoint.release(unit)
        progress(layer + 1, d.layers + 1)
    this_step = step.format("head")
    found = store.get(this_step)
    if found is None:
        (name,) = d.head.sources
        seen = zip((blocks.final(window) for window in hidden), importance[name][own], strict=True)
        total = sum((_weighted_square(x, weights) for x, weights in seen), torch.zeros(()))
        hessian = processes.summed(total) / windows.size
        found = store.put(this_step, {d.head.name: sliced(d.head, {name: hessian})})
    if not keep_weights:
        checkpoint.release(d.head)
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
    first: int,
) -> list[Hidden]:
    """The windows behind the sliced block, window i at depth ``i % depths + 1``.  first: which one ``hidden`` begins
    with."""
    after = list(hidden)
    for depth in range(1, profile.depths + 1):
        for unit in units:
            write_depth(checkpoint, unit, found[unit.name], profile, depth)
        for i in range((depth - 1 - first) % profile.depths, len(hidden), profile.depths):
            with fast(checkpoint.device):
                after[i] = blocks.run(layer, hidden[i])
    return after
