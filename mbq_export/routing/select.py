"""Fits every kind of router, measures the kinds at equal bits on held-back text, and selects the best.

A router's own parameters count among its bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from mbq_runtime.bundle.slice_profile import CODE_BITS

from .. import processes, quality
from ..calibrated import SMALLEST_DIVERGENCE, Comparison
from ..context import Calibration
from ..format.codes import Sliced
from ..format.router import RouterParams, route, router_scores
from ..model.blocks import fast_dtype
from ..model.router_inputs import Depths, ModelDepths
from ..tuning.teacher import Teacher
from . import kinds, thresholds
from .slice_gains import UnitStatistics, measure_gains

ABOVE_BASE_BITS = (0.5, 1.0, 2.0)
"""Budgets at which routers are compared, in bits above the base slice: where bits are scarce."""

RANDOM = "random"
"""Name of the random choice, which is measured beside the kinds of routers."""

Routers = Mapping[str, RouterParams]
"""By unit name."""

Losses = Mapping[str, NDArray[np.float64]]
"""float64 [budgets, windows] by kind of router: mean KL divergence from the original, nats a token."""

_EVERY = 3
"""All kinds are measured on one window in this many."""
_CLEAR = 2.0
"""A kind is clearly worse if its divergence is larger by this many standard errors of the paired difference."""

_TUNING_KIND = "mlp"
"""The kind that slices are tuned with, unless the recipe names one: it is selected most often."""

_TUNING_STEP = "routers for tuning"


_BRIEF_KIND = "norm"
"""The kind of a brief calibration: it needs no parameters of its own, and its thresholds hardly drift."""


def candidates(calibration: Calibration) -> list[str]:
    """The kinds of routers that a calibration selects from.

    Args:
        calibration: the context.
    """
    wanted = calibration.recipe.router
    if wanted != "auto":
        return [wanted]
    if calibration.profile.depths == 1:
        return ["static"]  # there is nothing to choose
    return [_BRIEF_KIND] if calibration.method.brief else list(kinds.ROUTERS)


def fit_routers(calibration: Calibration, kind: str, stats: Mapping[str, UnitStatistics]) -> dict[str, RouterParams]:
    """Fit one kind of router to every unit, with one table of thresholds for all.

    Args:
        calibration: the context.
        kind: a key of ``kinds.ROUTERS``.
        stats: by unit name.

    Returns:
        Routers by unit name.
    """
    profile, fit = calibration.profile, kinds.ROUTERS[kind].fit
    own = list(stats)[processes.share(len(stats))]
    fitted = processes.gathered(fit(stats[unit], profile, calibration.seed) for unit in own)
    routers = dict(zip(stats, fitted, strict=True))
    scores = [_scores(routers[unit], of_unit) for unit, of_unit in stats.items()]
    found = thresholds.table(scores, [of_unit.parameters for of_unit in stats.values()], profile)
    budgets = thresholds.budgets(profile)
    return {unit: replace(router, budgets=budgets, thresholds=found) for unit, router in routers.items()}


def _scores(router: RouterParams, stats: UnitStatistics) -> NDArray[np.float64]:
    if router.w1 is not None:
        assert stats.inputs is not None
        return router_scores(stats.inputs.astype(np.float32) * np.sqrt(stats.mean_square)[:, None], router)
    log_energy = np.log(stats.mean_square.astype(np.float64))[:, None]
    return np.asarray(router.bias.astype(np.float64) + router.norm_gain.astype(np.float64) * log_energy)


def routers_for_tuning(
    calibration: Calibration, slices: dict[str, Sliced], windows: NDArray[np.int64]
) -> dict[str, RouterParams]:
    """Routers that choose the depths while slices are tuned, fitted before the tuning.

    Args:
        calibration: the context.  Routers that its store holds are not fitted again.
        slices: by unit name.
        windows: int64 [windows, context] tokens to fit to.

    Returns:
        Routers by unit name.

    Raises:
        ModelError: an activation is not finite.
    """
    kept = calibration.store.arrays(_TUNING_STEP)
    if kept is None:
        kind = _TUNING_KIND if calibration.recipe.router == "auto" else calibration.recipe.router
        stats = measure_gains(
            calibration, slices, windows,
            keep_inputs=kinds.ROUTERS[kind].needs_inputs, stage="fitting routers for tuning",
        )  # fmt: skip
        kept = {
            f"{unit}:{field.name}": getattr(router, field.name)
            for unit, router in fit_routers(calibration, kind, stats).items()
            for field in fields(router)
            if getattr(router, field.name) is not None
        }
        calibration.store.put_arrays(_TUNING_STEP, kept)
    return {
        unit: RouterParams(**{field.name: kept.get(f"{unit}:{field.name}") for field in fields(RouterParams)})  # type: ignore[arg-type]
        for unit in slices
    }


def depths_at(routers: Routers, avg_bits: float) -> ModelDepths:
    """The depths that routers choose at a budget.

    Args:
        routers: by unit name.
        avg_bits: the budget, average bits per weight.
    """

    def of(router: RouterParams) -> Depths:
        return lambda x: torch.from_numpy(route(x.numpy(), avg_bits, router)).long()

    return {name: of(router) for name, router in routers.items()}


@dataclass(frozen=True)
class Selected:
    """The selected kind of router.

    kind: a key of ``kinds.ROUTERS``.
    routers: by unit name, with thresholds corrected for drift.
    comparison: figures of every kind.
    """

    kind: str
    routers: dict[str, RouterParams]
    comparison: Comparison


def select_kind(
    calibration: Calibration,
    fitted: Mapping[str, dict[str, RouterParams]],
    slices: Mapping[str, Sliced],
    original: Teacher,
) -> Selected:
    """Select the kind with the lowest mean divergence at ``ABOVE_BASE_BITS``.

    All kinds are measured on some of the windows.  Those that may still be the best are measured on the others too.

    Args:
        calibration: the context.
        fitted: routers by kind.
        slices: by unit name.
        original: the original model's predictions for the text to measure on.
    """
    lowest = calibration.profile.min_bits
    bits = [lowest + more for more in ABOVE_BASE_BITS if lowest + more < CODE_BITS]
    at = range(len(original.windows))
    first, rest = original.of(at[::_EVERY]), original.of([row for row in at if row % _EVERY])
    losses, used = measure_kinds(calibration, fitted, slices, first, bits)
    left = {name: fitted[name] for name in in_question({name: losses[name] for name in fitted})}
    sizes = [sum(processes.gathered([len(part.windows)])) for part in (first, rest)]
    if sizes[1]:
        of_rest, used_of_rest = measure_kinds(calibration, left, slices, rest, bits, beside_random=False)
        losses = {**losses, **{name: np.concatenate([losses[name], of_rest[name]], axis=1) for name in left}}
        used |= {name: list(np.average([used[name], used_of_rest[name]], axis=0, weights=sizes)) for name in left}
    kind = min(left, key=lambda name: float(losses[name].mean()))
    shared = next(iter(fitted[kind].values()))
    budgets = shared.budgets.astype(np.float64)
    drift = [realised - b for realised, b in zip(used[kind], bits, strict=True)]
    drift_at = np.interp(budgets, [lowest, *bits, CODE_BITS], [0.0, *drift, 0.0])
    corrected = np.interp(budgets - drift_at, budgets, shared.thresholds).astype(np.float32)
    routers = {unit: replace(router, thresholds=corrected) for unit, router in fitted[kind].items()}
    return Selected(kind, routers, comparison(losses, kind, bits))


def in_question(losses: Losses) -> list[str]:
    """The kinds that may be the best: the one with the lowest divergence, and those that are not clearly worse.

    Args:
        losses: by kind of router, of the same windows.
    """
    of_windows = {name: loss.mean(axis=0) for name, loss in losses.items()}
    best = min(of_windows.values(), key=lambda loss: float(loss.mean()))

    def is_worse(loss: NDArray[np.float64]) -> bool:
        more = loss - best
        return len(more) > 1 and bool(more.mean() > _CLEAR * more.std(ddof=1) / np.sqrt(len(more)))

    return [name for name, loss in of_windows.items() if not is_worse(loss)]


def measure_kinds(
    calibration: Calibration,
    fitted: Mapping[str, Routers],
    slices: Mapping[str, Sliced],
    original: Teacher,
    bits: Sequence[float],
    *,
    beside_random: bool = True,
) -> tuple[Losses, dict[str, list[float]]]:
    """Measure kinds of routers and a random choice at equal bits, those of the routers included.

    Args:
        calibration: the context.
        fitted: routers by kind.
        slices: by unit name.
        original: the original model's predictions for the text to measure on.
        bits: budgets, average bits.
        beside_random: whether the random choice is measured too.

    Returns:
        Losses at exactly ``bits``; and by kind the bits of weights that it used when asked for ``bits``, without those
        of its routers.
    """
    random = partial(_random_depths, calibration, slices)
    names = [*fitted, RANDOM] if beside_random else list(fitted)
    cases: list[ModelDepths] = [
        depths_at(fitted[name], b) if name in fitted else random(b) for name in names for b in bits
    ]
    # All kinds agree at the ends, where there is nothing to choose.
    ends = [random(b) for b in (calibration.profile.min_bits, CODE_BITS)]
    results = quality.measure(
        calibration, slices, original, [*cases, *ends],
        stage="comparing routers", dtype=fast_dtype(calibration.checkpoint.device),
    )  # fmt: skip
    lowest, highest = results[len(cases) :]
    by_name = {name: results[i * len(bits) : (i + 1) * len(bits)] for i, name in enumerate(names)}
    read = {unit.name: unit.read_of(slices[unit.name].codes.size) for unit in calibration.checkpoint.decoder.units()}
    left = {name: np.array(bits) - (router_bits(fitted[name], read) if name in fitted else 0) for name in names}
    losses = {name: _at_equal_bits([lowest, *of_kind, highest], left[name]) for name, of_kind in by_name.items()}
    return losses, {name: [result.avg_bits_used for result in of_kind] for name, of_kind in by_name.items()}


def _random_depths(calibration: Calibration, slices: Mapping[str, Sliced], avg_bits: float) -> ModelDepths:
    random = kinds.random_depths(calibration.profile, calibration.seed)
    return {unit: random(avg_bits) for unit in slices}


def router_bits(routers: Routers, weights: Mapping[str, int]) -> float:
    """Bits of all routers' parameters for each weight: a token reads all of them.

    Args:
        routers: by unit name.
        weights: how many weights of a unit a token reads, by unit name.
    """
    return 8 * sum(router.bytes for router in routers.values()) / sum(weights.values())


def _at_equal_bits(results: list[quality.Measured], bits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divergence at exactly ``bits``, float64 [len(bits), windows], by interpolation of the results.

    Divergence over bits is convex, so this is an upper bound.
    """
    used = np.array([result.avg_bits_used for result in results])
    order = np.argsort(used)
    found = np.stack([results[i].divergence for i in order])
    return np.stack([np.interp(bits, used[order], of_window) for of_window in found.T], axis=1)


def comparison(losses: Losses, shipped: str, bits: Sequence[float]) -> Comparison:
    """Divergence of each kind, its ratio to the shipped kind's, and the ratio's standard error over paired windows.

    Args:
        losses: by kind of router.  A kind has those of the shipped kind's windows, or of the first of them.
        shipped: the kind that ships.
        bits: budgets of the losses, average bits.
    """

    def compared(loss: NDArray[np.float64], best: NDArray[np.float64]) -> dict[str, float]:
        # A model that says the same at all bits has no divergence.  A ratio to 0 is no number.
        least = max(float(best.mean()), SMALLEST_DIVERGENCE)
        ratio = max(float(loss.mean()), SMALLEST_DIVERGENCE) / least
        difference = (loss - ratio * best) / least
        stderr = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else 0.0
        figures = {"kl_divergence": loss.mean(), "over_shipped": ratio, "stderr": stderr}
        return {name: round(float(figure), 4) for name, figure in figures.items()}

    return {
        name: {f"{b:g}": compared(loss[i], losses[shipped][i, : loss.shape[1]]) for i, b in enumerate(bits)}
        for name, loss in losses.items()
    }
