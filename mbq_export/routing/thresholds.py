"""The table of thresholds: from a budget in average bits to the threshold that realises it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.slice_profile import CODE_BITS, SliceProfile

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

BUDGET_STEP_BITS = 0.25
"""Distance of the table's budgets, in average bits."""
_MARGIN = 1.0
"""Distance of the table's end thresholds from the outermost scores."""


def budgets(profile: SliceProfile) -> F32:
    """The budgets of the table, from the lowest depth's bits to 8.

    Args:
        profile: the bits of each slice.

    Returns:
        float32 [T], average bits.
    """
    steps = round((CODE_BITS - profile.min_bits) / BUDGET_STEP_BITS)
    return np.linspace(profile.min_bits, CODE_BITS, steps + 1, dtype=np.float32)


def table(scores: list[F64], parameters: list[int], profile: SliceProfile) -> F32:
    """One threshold a budget, shared by all units, so that the realised average is the budget.

    A slice is read when its score and all earlier ones are above the threshold, which is when their running minimum
    is.  So the threshold of a budget is a weighted quantile of these minima.

    Args:
        scores: float64 [tokens, E - 1] of each unit.
        parameters: weights of each unit.
        profile: the bits of each slice.

    Returns:
        float32 [T], one for each of ``budgets``.
    """
    bits = np.diff(np.asarray(profile.depth_bits, np.float64))
    if not len(bits):
        return np.zeros(len(budgets(profile)), np.float32)
    effective = np.concatenate([np.minimum.accumulate(s, axis=1).ravel() for s in scores])
    total = float(sum(parameters))
    cost = np.concatenate(
        [np.tile(bits * n / (total * len(s)), len(s)) for s, n in zip(scores, parameters, strict=True)]
    )
    order = np.argsort(-effective, kind="stable")
    descending = effective[order]
    realised = profile.min_bits + np.cumsum(cost[order])
    wanted = budgets(profile).astype(np.float64)
    found = np.interp(wanted, realised, descending)
    found[0] = descending[0] + _MARGIN
    found[-1] = descending[-1] - _MARGIN
    return np.asarray(found, np.float32)
