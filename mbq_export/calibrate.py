"""Checkpoint and text in, slices and routers out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.errors import UsageError
from mbq_runtime.profile import SliceProfile

from .checkpoint import Checkpoint
from .families import Unit
from .routing import mlp, norm, thresholds
from .routing.statistics import UnitStatistics, collect
from .slicing import rtn
from .slicing.reference import RouterParams, Sliced, router_scores
from .slicing.smoothing import smooth

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many steps are done and how many there are."""

CONTEXT_TOKENS = 512


@dataclass(frozen=True)
class RoutedLinear:
    """A unit ready to be lowered.  bias: float32 [N] or None."""

    unit: Unit
    sliced: Sliced
    bias: NDArray[np.float32] | None
    router: RouterParams

    @property
    def parameters(self) -> int:
        return int(self.sliced.codes.size)


@dataclass(frozen=True)
class Calibrated:
    """units: by name, in the graph's order; embedding: None when the head's slices serve for it;
    head_scale: float32 [hidden], what such a row of the head is divided by."""

    profile: SliceProfile
    group_size: int
    router_kind: str
    units: dict[str, RoutedLinear]
    embedding: Sliced | None
    head_scale: NDArray[np.float32]


def _norm_router(stats: UnitStatistics, profile: SliceProfile, seed: int) -> RouterParams:
    bias, gain = norm.fit(stats, profile)
    return RouterParams(bias, gain, _EMPTY, _EMPTY)


def _mlp_router(stats: UnitStatistics, profile: SliceProfile, seed: int) -> RouterParams:
    bias, gain, weights = mlp.fit(stats, profile, seed)
    return RouterParams(bias, gain, _EMPTY, _EMPTY, weights.w1, weights.b1, weights.w2)


_EMPTY = np.zeros(0, np.float32)

ROUTERS: dict[str, Callable[[UnitStatistics, SliceProfile, int], RouterParams]] = {
    "norm": _norm_router,
    "mlp": _mlp_router,
}
"""Router kinds; a fit leaves the threshold table empty, which is set jointly afterwards."""


def token_windows(checkpoint: Checkpoint, text: str, tokens: int) -> NDArray[np.int64]:
    """int64 [windows, 512] of the text's tokens, spread evenly over it.

    Raises UsageError when the text has fewer than ``tokens`` tokens.
    """
    count = max(1, tokens // CONTEXT_TOKENS)
    ids = checkpoint.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    available = len(ids) // CONTEXT_TOKENS
    if available < count:
        raise UsageError(
            f"the calibration text has {len(ids)} tokens, {count * CONTEXT_TOKENS} are needed "
            f"({count} windows of {CONTEXT_TOKENS}); give a longer --calib-data or a smaller --calib-tokens"
        )
    starts = np.linspace(0, available - 1, count).astype(int) * CONTEXT_TOKENS
    return np.stack([np.asarray(ids[s : s + CONTEXT_TOKENS], np.int64) for s in starts])


def calibrate(
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    profile: SliceProfile,
    group_size: int,
    router_kind: str,
    seed: int,
    progress: Progress = lambda what, done, total: None,
) -> Calibrated:
    """Slice every unit, fit its router and set the thresholds jointly.  Rescales the checkpoint in place.

    windows: int64 [windows, context] tokens.  ``group_size`` must divide every unit's K.
    Raises ModelError for weights or activations that are not finite.
    """
    units = list(checkpoint.decoder.units())
    head_scale = smooth(checkpoint, windows, lambda done, total: progress("measuring activations", done, total))
    slices = {}
    for i, unit in enumerate(units):
        slices[unit.name] = rtn.slice_weight(checkpoint.weight(unit), group_size, unit.name)
        progress("slicing", i + 1, len(units))
    stats = collect(
        checkpoint, slices, profile, windows, seed,
        keep_inputs=router_kind == "mlp",
        progress=lambda done, total: progress("measuring slices", done, total),
    )  # fmt: skip
    routers, scores = {}, []
    for i, unit in enumerate(units):
        unit_stats = stats.pop(unit.name)
        router = ROUTERS[router_kind](unit_stats, profile, seed)
        routers[unit.name] = router
        scores.append(_scores(router, unit_stats))
        progress("fitting routers", i + 1, len(units))
    budget = thresholds.budgets(profile)
    found = thresholds.table(scores, [slices[unit.name].codes.size for unit in units], profile)
    linears = {
        unit.name: RoutedLinear(
            unit, slices[unit.name], checkpoint.bias(unit), _with_table(routers[unit.name], budget, found)
        )
        for unit in units
    }
    embedding = None if checkpoint.decoder.tied else rtn.slice_weight(checkpoint.embedding(), group_size, "embedding")
    return Calibrated(profile, group_size, router_kind, linears, embedding, head_scale)


def _scores(router: RouterParams, stats: UnitStatistics) -> NDArray[np.float64]:
    if stats.inputs is not None:
        return router_scores(stats.inputs, router)
    log_energy = np.log(stats.mean_square.astype(np.float64))[:, None]
    return np.asarray(router.bias.astype(np.float64) + router.norm_gain.astype(np.float64) * log_energy)


def _with_table(router: RouterParams, budget: NDArray[np.float32], found: NDArray[np.float32]) -> RouterParams:
    return RouterParams(router.bias, router.norm_gain, budget, found, router.w1, router.b1, router.w2)
