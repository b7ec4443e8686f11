"""The kinds of routers.  A calibration ships the kind that measures best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from mbq_runtime.bundle.slice_profile import SliceProfile

from ..format.router import RouterParams
from ..model.router_inputs import Depths
from . import mlp, norm
from .slice_gains import UnitStatistics

_EMPTY = np.zeros(0, np.float32)


@dataclass(frozen=True)
class RouterKind:
    """One kind of router.

    fit: makes the router of one unit, without its table, from the unit's statistics, the profile and a seed.
    needs_inputs: whether the statistics must hold the router's inputs.
    """

    fit: Callable[[UnitStatistics, SliceProfile, int], RouterParams]
    needs_inputs: bool = False


def _static(stats: UnitStatistics, profile: SliceProfile, seed: int) -> RouterParams:
    return RouterParams(*norm.rule(stats, profile, beta=0.0), _EMPTY, _EMPTY)


def _norm(stats: UnitStatistics, profile: SliceProfile, seed: int) -> RouterParams:
    return RouterParams(*norm.rule(stats, profile, norm.slope(stats)), _EMPTY, _EMPTY)


def _mlp(stats: UnitStatistics, profile: SliceProfile, seed: int) -> RouterParams:
    bias, gain, weights = mlp.train(stats, profile, seed)
    return RouterParams(bias, gain, _EMPTY, _EMPTY, weights.w1, weights.b1, weights.w2)


ROUTERS = {
    "static": RouterKind(_static),
    "norm": RouterKind(_norm),
    "mlp": RouterKind(_mlp, needs_inputs=True),
}
"""By the name that ``--router`` and manifests use."""


def random_depths(profile: SliceProfile, seed: int) -> Callable[[float], Depths]:
    """The random choice that a router must beat: each token gets one of the two depths around a budget.

    Args:
        profile: the bits of each slice.
        seed: of the choices.

    Returns:
        From average bits to the depths of a unit's tokens.
    """
    bits = torch.tensor(profile.depth_bits, dtype=torch.float64)

    def at(avg_bits: float) -> Depths:
        generator = torch.Generator().manual_seed(seed)
        low = int((bits <= avg_bits).sum())
        step = float(bits[min(low, len(bits) - 1)] - bits[low - 1])
        share = (avg_bits - float(bits[low - 1])) / step if step else 0.0

        def depths(x: torch.Tensor) -> torch.Tensor:
            return low + (torch.rand(len(x), generator=generator) < share).long()

        return depths

    return at
