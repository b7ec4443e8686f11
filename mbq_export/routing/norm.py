"""The norm rule: the gain of a slice for a token is the unit's average gain, scaled by a power of the input's energy.

``score = log(gain per bit and parameter) + beta * log(mean(x**2)) - log(average of mean(x**2)**beta)``.

It reads only the router's input.  One threshold over all units allocates bits between units and between tokens.  With
``beta = 0`` it allocates between units only.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.slice_profile import SliceProfile

from .slice_gains import UnitStatistics

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

_SMALLEST_GAIN = 1e-30


def average_gain(stats: UnitStatistics, profile: SliceProfile) -> F64:
    """Average loss that each further slice removes, per bit and parameter.

    It never increases from a slice to the next: isotonic regression, weighted by bits, pools neighbours.  So where a
    later slice gains more than an earlier one, both are read or left together.

    Args:
        stats: of one unit.
        profile: the bits of each slice.

    Returns:
        float64 [E - 1].
    """
    bits = np.diff(np.asarray(profile.depth_bits, np.float64))
    loss = stats.loss.astype(np.float64).mean(axis=0)
    gain = np.maximum((loss[:-1] - loss[1:]) / (bits * stats.parameters), _SMALLEST_GAIN)
    pools: list[list[float]] = []  # [gain, bits, slices]
    for g, b in zip(gain, bits, strict=True):
        pools.append([g, b, 1])
        while len(pools) > 1 and pools[-1][0] > pools[-2][0]:
            last, before = pools.pop(), pools.pop()
            total = last[1] + before[1]
            pools.append([(last[0] * last[1] + before[0] * before[1]) / total, total, last[2] + before[2]])
    return np.concatenate([np.full(int(n), g) for g, _, n in pools]) if pools else np.zeros(0)


_NEWTON_STEPS = 20
_LARGEST_SLOPE = 3.0
_TRUST = 0.5
"""Share of a fitted slope that is used.  Losses have heavy tails, so a fit to a few thousand tokens overstates the
effect of energy (docs/log.md)."""


def slope(stats: UnitStatistics) -> float:
    """beta: the power of its input's energy with which a token's loss at the shallowest depth grows.

    The model of a token's loss is an exponential distribution with mean ``exp(a + beta * log(mean(x**2)))``, which is
    close to a squared Gaussian.  Newton's method finds the likeliest a and beta, and ``_TRUST`` of beta is used.

    Args:
        stats: of one unit.
    """
    log_energy = np.log(stats.mean_square.astype(np.float64))
    log_energy -= log_energy.mean()
    loss = stats.loss[:, 0].astype(np.float64)
    if log_energy.std() < 1e-3 or loss.max() <= 0:
        return 0.0
    features = np.stack([np.ones_like(log_energy), log_energy], axis=1)
    fitted = np.array([np.log(loss.mean()), 0.0])
    for _ in range(_NEWTON_STEPS):
        ratio = loss * np.exp(-features @ fitted)
        curvature = features.T @ (features * np.maximum(ratio, 0.1)[:, None])
        step = np.linalg.solve(curvature, features.T @ (ratio - 1))
        fitted += np.clip(step, -0.5, 0.5)
    return _TRUST * float(np.clip(fitted[1], -_LARGEST_SLOPE, _LARGEST_SLOPE))


def rule(stats: UnitStatistics, profile: SliceProfile, beta: float) -> tuple[F32, F32]:
    """The norm rule of one unit.

    Args:
        stats: of the unit.
        profile: the bits of each slice.
        beta: power of the input's energy.

    Returns:
        bias and norm_gain of ``RouterParams``, both float32 [E - 1].
    """
    spread = np.log(np.mean(stats.mean_square.astype(np.float64) ** beta))
    bias = np.log(average_gain(stats, profile)) - spread
    return bias.astype(np.float32), np.full(profile.depths - 1, beta, np.float32)
