"""The kinds of routers, from which a calibration takes the one that measures best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from mbq_runtime.bundle.slice_profile import SliceProfile

from ..format.router import RouterParams
from . import mlp, norm
from .slice_gains import UnitStatistics

_EMPTY = np.zeros(0, np.float32)


@dataclass(frozen=True)
class Router:
    """fit: the router of one unit, its threshold table left empty; needs_inputs: whether the statistics
    must hold the router's inputs whole."""

    fit: Callable[[UnitStatistics, SliceProfile, int], RouterParams]
    needs_inputs: bool = False


def _static(stats: UnitStatistics, profile: SliceProfile, seed: int) -> RouterParams:
    return RouterParams(*norm.fit(stats, profile, beta=0.0), _EMPTY, _EMPTY)


def _norm(stats: UnitStatistics, profile: SliceProfile, seed: int) -> RouterParams:
    return RouterParams(*norm.fit(stats, profile, norm.slope(stats)), _EMPTY, _EMPTY)


def _mlp(stats: UnitStatistics, profile: SliceProfile, seed: int) -> RouterParams:
    bias, gain, weights = mlp.fit(stats, profile, seed)
    return RouterParams(bias, gain, _EMPTY, _EMPTY, weights.w1, weights.b1, weights.w2)


ROUTERS = {
    "static": Router(_static),
    "norm": Router(_norm),
    "mlp": Router(_mlp, needs_inputs=True),
}


def random_depths(profile: SliceProfile, seed: int) -> Callable[[float], Callable[[torch.Tensor], torch.Tensor]]:
    """What a router must beat: for an average of bits, each token takes one of the two depths around it by chance."""
    bits = torch.tensor(profile.depth_bits, dtype=torch.float64)

    def at(avg_bits: float) -> Callable[[torch.Tensor], torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        low = int((bits <= avg_bits).sum())
        step = float(bits[min(low, len(bits) - 1)] - bits[low - 1])
        share = (avg_bits - float(bits[low - 1])) / step if step else 0.0

        def depths(x: torch.Tensor) -> torch.Tensor:
            return low + (torch.rand(len(x), generator=generator) < share).long()

        return depths

    return at
