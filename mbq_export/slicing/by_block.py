"""Slices a model block by block.  Each block gets the inputs that the sliced blocks before it produce.

The windows go through the sliced part at different depths in turn.  So a block sees the inputs of every budget.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from mbq_runtime.bundle.slice_profile import SliceProfile

from .. import processes
from ..context import Calibration
from ..format.codes import F32, Sliced, joined
from ..memory import WEIGHTS_AT_ONCE
from ..model.blocks import Blocks, Hidden, fast_passes, require_finite, watching_inputs
from ..model.checkpoint import Checkpoint
from ..model.shape import Unit
from ..model.sliced_linear import row_ranges, values_at
from . import nested
from .columns import DEEP, DEEP_LATER
from .expert_inputs import FEWEST_TOKENS, ExpertInputs, add_weighted_square
from .importance import Importance
from .refine import refine

log = logging.getLogger(__name__)

_SliceRows = Callable[[str, slice, F32, torch.Tensor], Sliced]
"""Slices some rows of a layer.  Takes the layer's name, the rows, their weights float32 [rows, K], and the second
moments of the layer's inputs [K, K]."""


def slice_model(
    calibration: Calibration, windows: NDArray[np.int64], importance: Importance, *, keep_weights: bool = False
) -> dict[str, Sliced]:
    """Nested slices of every unit.

    Blocks that the store holds are not sliced again.

    Args:
        calibration: the context.
        windows: int64 [windows, context] tokens.
        importance: weights of these tokens.
        keep_weights: keep the checkpoint's weights, which are otherwise released block by block.  They are kept where
            ``slice_residuals`` will choose the fine bits again.

    Returns:
        Slices by unit name.

    Raises:
        ModelError: a weight or an activation is not finite.
    """
    profile, group_size = calibration.profile, calibration.recipe.group_size
    sweeps, deep = calibration.method.sweeps, DEEP_LATER if keep_weights else DEEP

    def slice_rows(name: str, rows: slice, weight: F32, hessian: torch.Tensor) -> Sliced:
        fed_back = nested.slice_weight(weight, hessian, group_size, profile, name, deep=deep)
        return refine(weight, hessian, fed_back, profile, sweeps, deep=deep)

    walk = _Walk("slicing blocks", "{}", slice_rows, keep_weights)
    return _slice_blocks(calibration, windows, importance, walk)


def slice_residuals(
    calibration: Calibration,
    windows: NDArray[np.int64],
    importance: Importance,
    slices: dict[str, Sliced],
    *,
    kept_bits: int,
    keep_weights: bool = False,
) -> dict[str, Sliced]:
    """Choose the last bits of all codes again, for given scales, offsets and first bits.

    They are fitted to the weights that the checkpoint still has.

    Args:
        calibration: the context.
        windows: int64 [windows, context] tokens.
        importance: weights of these tokens.
        slices: by unit name; their scales, offsets and the first bits of their codes stay as they are.
        kept_bits: how many of each code's first bits stay.
        keep_weights: keep the checkpoint's weights, which are otherwise released block by block.

    Returns:
        Slices by unit name.

    Raises:
        ModelError: a weight or an activation is not finite.
    """
    checkpoint, profile, sweeps = calibration.checkpoint, calibration.profile, calibration.method.sweeps
    by_layer = {
        name: slices[unit.name].rows(rows)
        for unit in checkpoint.decoder.units()
        for name, (_, rows) in zip(unit.sources, checkpoint.layers(unit), strict=True)
    }

    def slice_rows(name: str, rows: slice, weight: F32, hessian: torch.Tensor) -> Sliced:
        earlier = by_layer[name].rows(rows)
        group_size = earlier.group_size
        fed_back = nested.slice_weight(weight, hessian, group_size, profile, name, earlier=earlier, kept_bits=kept_bits)
        return refine(weight, hessian, fed_back, profile, sweeps, kept_bits=kept_bits)

    step = f"{{}}.after{kept_bits}"
    walk = _Walk(f"choosing slices after {kept_bits} bits", step, slice_rows, keep_weights)
    return _slice_blocks(calibration, windows, importance, walk)


_Hessians = dict[str, Callable[[], torch.Tensor]]
"""By a layer's name, what makes the second moments of its inputs, float32 [K, K]."""


@dataclass(frozen=True)
class _Walk:
    """One walk over all blocks.

    stage: its name; step: name of a block's step in the store, with ``{}`` for the block; slice_rows: how rows are
    sliced; keep_weights: whether the checkpoint keeps its weights.
    """

    stage: str
    step: str
    slice_rows: _SliceRows
    keep_weights: bool

    def slice_unit(self, checkpoint: Checkpoint, unit: Unit, hessians: _Hessians) -> Sliced:
        parts = []
        for name in unit.sources:
            whole, hessian = checkpoint.linear(name).weight.detach().cpu().numpy(), hessians.pop(name)()
            ranges = row_ranges(whole.shape, WEIGHTS_AT_ONCE, processes.share(len(whole)))
            parts += processes.gathered(self.slice_rows(name, rows, whole[rows], hessian) for rows in ranges)
        return joined(parts)


def _slice_blocks(
    calibration: Calibration, windows: NDArray[np.int64], importance: Importance, walk: _Walk
) -> dict[str, Sliced]:
    progress, checkpoint, store = calibration.stage(walk.stage), calibration.checkpoint, calibration.store
    d = checkpoint.decoder
    blocks = Blocks(checkpoint, windows.shape[1])
    own = processes.share(len(windows))
    hidden = blocks.embed(windows[own])
    slices: dict[str, Sliced] = {}
    rare_step = walk.step.format("rare_experts")
    kept = store.arrays(rare_step)
    rare = np.zeros(d.layers, np.int64) if kept is None else kept["counts"].copy()
    for layer in range(d.layers):
        units = list(d.layer_units(layer).values())
        step = walk.step.format(d.block(layer))
        found = store.get(step)
        if found is None:
            of_experts = ExpertInputs(checkpoint, layer, importance, own)
            hessians = _hessians(blocks, layer, hidden, importance, own, of_experts)
            if of_experts.rare:
                rare[layer] = of_experts.rare
                store.put_arrays(rare_step, {"counts": rare})
            found = store.put(step, {unit.name: walk.slice_unit(checkpoint, unit, hessians) for unit in units})
        linears = [checkpoint.linear(name) for unit in units for name in unit.sources]
        weights = [linear.weight.detach().clone() for linear in linears] if walk.keep_weights else []
        hidden = _advance(blocks, layer, found, hidden, calibration.profile, own.start)
        slices |= found
        if walk.keep_weights:
            with torch.no_grad():
                for linear, weight in zip(linears, weights, strict=True):
                    linear.weight.copy_(weight)
        else:
            for unit in units:
                checkpoint.release(unit)
        progress(layer + 1, d.layers + 1)
    if rare.any():
        log.warning(
            "%s: %d experts saw fewer than %d tokens of the calibration text: each of their weights is rounded by "
            "itself; give more --calib-tokens", walk.stage, rare.sum(), FEWEST_TOKENS,
        )  # fmt: skip
    step = walk.step.format("head")
    found = store.get(step)
    if found is None:
        (name,) = d.head.sources
        total = torch.zeros(d.hidden_size, d.hidden_size, device=checkpoint.device)
        for window, weights in zip(hidden, importance[name][own], strict=True):
            add_weighted_square(total, blocks.final(window), weights)
        hessian = processes.summed(total) / windows.size
        if d.tied:
            hessian = nested.damped(hessian, nested.TIED_DAMPING)
        found = store.put(step, {d.head.name: walk.slice_unit(checkpoint, d.head, {name: lambda: hessian})})
    if not walk.keep_weights:
        checkpoint.release(d.head)
    progress(d.layers + 1, d.layers + 1)
    return slices | found


def _hessians(
    blocks: Blocks, layer: int, hidden: list[Hidden], importance: Importance, windows: slice, experts: ExpertInputs
) -> _Hessians:
    """Second moments of the inputs of each layer in a block: mean of ``x x.T``, weighted by importance.

    hidden: the residual streams of ``windows``.
    """
    checkpoint = blocks.checkpoint
    units = [unit for unit in checkpoint.decoder.layer_units(layer).values() if unit.experts is None]
    sums: dict[str, torch.Tensor] = {}
    sources = {unit.name: unit.sources for unit in units}

    def add(name: str, x: torch.Tensor) -> None:
        with torch.autocast(x.device.type, enabled=False):
            for source in sources[name]:
                if source not in sums:
                    sums[source] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
                add_weighted_square(sums[source], x, importance[source][windows][at])

    first = {unit.name: unit.sources[0] for unit in units}
    passes = fast_passes(blocks.layers[layer], checkpoint.device)
    with passes, watching_inputs(checkpoint, first, add), experts.watching():
        for at, window in enumerate(hidden):
            experts.window = at
            blocks.run(layer, window)
    for name, total in sums.items():
        require_finite(name, processes.summed(total))
    tokens = next(iter(importance.values())).size
    return {
        **{name: partial(torch.Tensor.div_, total, tokens) for name, total in sums.items()},
        **experts.hessians(tokens),
    }


def _advance(
    blocks: Blocks, layer: int, slices: dict[str, Sliced], hidden: list[Hidden], profile: SliceProfile, first: int
) -> list[Hidden]:
    """Run the windows through a sliced block, window i at depth ``i % depths + 1``.  first: index of the first one."""
    checkpoint, after = blocks.checkpoint, list(hidden)
    for depth in range(1, profile.depths + 1):
        for unit in checkpoint.decoder.layer_units(layer).values():
            _write_depth(checkpoint, unit, slices[unit.name], profile, depth)
        with fast_passes(blocks.layers[layer], checkpoint.device):
            for i in range((depth - 1 - first) % profile.depths, len(hidden), profile.depths):
                after[i] = blocks.run(layer, hidden[i])
    return after


def _write_depth(checkpoint: Checkpoint, unit: Unit, sliced: Sliced, profile: SliceProfile, depth: int) -> None:
    """Put the unit's values at ``depth`` (1-based) into the checkpoint's layers."""
    with torch.no_grad():
        for layer, rows in checkpoint.layers(unit):
            layer.weight.copy_(values_at(sliced.rows(rows), profile, depth, device=checkpoint.device))
