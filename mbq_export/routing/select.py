"""Fits every kind of router, measures them at equal bits on held-back text, and takes the one that loses least.

A router's own parameters count among its bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from mbq_runtime.bundle.slice_profile import CODE_BITS, SliceProfile

from .. import processes, quality
from ..format.codes import Sliced
from ..format.router import RouterParams, route, router_scores
from ..model.blocks import fast_dtype
from ..model.checkpoint import Checkpoint
from ..model.router_inputs import Depths
from . import kinds, thresholds
from .slice_gains import UnitStatistics

ABOVE_BASE_BITS = (0.5, 1.0, 2.0)
"""How far over the base slice's bits are the budgets at which routers are compared: where bits are scarce."""

RANDOM = "random"
"""What is measured beside the kinds, and nothing ships."""

Routers = Mapping[str, RouterParams]
"""By unit."""

Losses = Mapping[str, NDArray[np.float64]]
"""float64 [budgets, windows] by kind of router: mean nats a token."""

Comparison = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Figures by kind of router and average bits."""


def fit(
    kind: str, stats: dict[str, UnitStatistics], slices: Mapping[str, Sliced], profile: SliceProfile, seed: int
) -> dict[str, RouterParams]:
    """One kind of router for every unit, with its joint table of thresholds."""
    of_kind = kinds.ROUTERS[kind].fit
    own = list(stats)[processes.share(len(stats))]
    fitted = processes.gathered(of_kind(stats[unit], profile, seed) for unit in own)
    routers = dict(zip(stats, fitted, strict=True))
    scores = [_scores(routers[unit], of_unit) for unit, of_unit in stats.items()]
    found = thresholds.table(scores, [slices[unit].codes.size for unit in stats], profile)
    budgets = thresholds.budgets(profile)
    return {unit: replace(router, budgets=budgets, thresholds=found) for unit, router in routers.items()}


def _scores(router: RouterParams, stats: UnitStatistics) -> NDArray[np.float64]:
    if router.w1 is not None:
        assert stats.inputs is not None
        return router_scores(stats.inputs.astype(np.float32) * np.sqrt(stats.mean_square)[:, None], router)
    log_energy = np.log(stats.mean_square.astype(np.float64))[:, None]
    return np.asarray(router.bias.astype(np.float64) + router.norm_gain.astype(np.float64) * log_energy)


def case(routers: Routers, avg_bits: float) -> quality.Case:
    """The model routed so."""

    def of(router: RouterParams) -> Depths:
        return lambda x: torch.from_numpy(route(x.numpy(), avg_bits, router)).long()

    return {name: of(router) for name, router in routers.items()}


def choose(
    checkpoint: Checkpoint,
    fits: Mapping[str, dict[str, RouterParams]],
    slices: Mapping[str, Sliced],
    profile: SliceProfile,
    seed: int,
    windows: NDArray[np.int64],
    progress: Callable[[int, int], None],
) -> tuple[str, dict[str, RouterParams], Comparison]:
    """The kind with the lowest mean loss at ABOVE_BASE_BITS, its routers with thresholds corrected for drift, and what
    each kind reached on int64 [windows, context]."""
    bits = [profile.min_bits + more for more in ABOVE_BASE_BITS if profile.min_bits + more < CODE_BITS]
    losses, used = measure(checkpoint, fits, slices, profile, seed, windows, bits, progress)
    kind = min(fits, key=lambda name: float(losses[name].mean()))
    shared = next(iter(fits[kind].values()))
    budgets = shared.budgets.astype(np.float64)
    drift = [realised - b for realised, b in zip(used[kind], bits, strict=True)]
    drift_at = np.interp(budgets, [profile.min_bits, *bits, CODE_BITS], [0.0, *drift, 0.0])
    corrected = np.interp(budgets - drift_at, budgets, shared.thresholds).astype(np.float32)
    routers = {unit: replace(router, thresholds=corrected) for unit, router in fits[kind].items()}
    return kind, routers, comparison(losses, kind, bits)


def measure(
    checkpoint: Checkpoint,
    fits: Mapping[str, Routers],
    slices: Mapping[str, Sliced],
    profile: SliceProfile,
    seed: int,
    windows: NDArray[np.int64],
    bits: Sequence[float],
    progress: Callable[[int, int], None],
) -> tuple[Losses, dict[str, list[float]]]:
    """What every kind in ``fits``, and a random choice, lose at exactly ``bits``, those of routers among them; and the
    bits of weights they took by kind, asked for ``bits`` without the routers'.

    windows: int64 [windows, context].
    """
    random = kinds.random_depths(profile, seed)
    names = [*fits, RANDOM]
    cases = [
        case(fits[name], b) if name in fits else {unit: random(b) for unit in slices} for name in names for b in bits
    ]
    # All agree at the ends, where there is nothing to choose.
    ends = [{unit: random(b) for unit in slices} for b in (profile.min_bits, CODE_BITS)]
    fast = fast_dtype(checkpoint.device)
    results = quality.measure(checkpoint, slices, profile, windows, [*cases, *ends], progress, fast)
    lowest, highest = results[len(cases) :]
    by_name = {name: results[i * len(bits) : (i + 1) * len(bits)] for i, name in enumerate(names)}
    left = {name: np.array(bits) - (router_bits(fits[name], slices) if name in fits else 0) for name in names}
    losses = {name: _at_equal_bits([lowest, *of_kind, highest], left[name]) for name, of_kind in by_name.items()}
    return losses, {name: [result.avg_bits_used for result in of_kind] for name, of_kind in by_name.items()}


def router_bits(routers: Routers, slices: Mapping[str, Sliced]) -> float:
    """Bits of all routers' parameters for each weight: a token reads all of them."""
    return 8 * sum(router.bytes for router in routers.values()) / sum(sliced.codes.size for sliced in slices.values())


def _at_equal_bits(results: list[quality.Measured], bits: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 [len(bits), windows]: mean nats a token at exactly ``bits``, by interpolation between what was realised.

    Loss over bits is convex, so this is never less than the truth.
    """
    used = np.array([result.avg_bits_used for result in results])
    order = np.argsort(used)
    nll = np.stack([results[i].nll for i in order])
    return np.stack([np.interp(bits, used[order], of_window) for of_window in nll.T], axis=1)


def comparison(losses: Losses, shipped: str, bits: Sequence[float]) -> Comparison:
    """Perplexity of each kind, its ratio to the shipped one's, and the standard error of that over paired windows."""

    def compared(loss: NDArray[np.float64], best: NDArray[np.float64]) -> dict[str, float]:
        difference = loss - best
        stderr = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else 0.0
        ratio = np.exp(difference.mean())
        figures = {"perplexity": np.exp(loss.mean()), "over_shipped": ratio, "stderr": ratio * stderr}
        return {name: round(float(figure), 4) for name, figure in figures.items()}

    return {
        name: {f"{b:g}": compared(loss[i], losses[shipped][i]) for i, b in enumerate(bits)}
        for name, loss in losses.items()
    }
