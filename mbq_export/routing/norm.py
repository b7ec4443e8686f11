"""The norm rule: a slice's worth to a token is the unit's average worth, scaled by a power of the input's energy.

``score = log(gain per bit and parameter) + beta * log(mean(x**2)) - log(average of mean(x**2)**beta)``: nothing
is read but the router's input, and one threshold over all units is at once a static allocation between
units and a choice between tokens.  With ``beta = 0`` only the static allocation is left.
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
    """Float64 [E - 1]: average loss removed by each further slice, per bit and parameter.

    Made non-increasing by pooling neighbours (isotonic regression weighted by bits): where a later
    slice is worth more than an earlier one, both are taken or left together.
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
"""What is kept of a fitted slope.  Losses are so heavy-tailed that a fit to a few thousand tokens overstates what an
energy tells: on SmolLM2-135M the whole slope gave 1.046 times the original's perplexity at 5 bits, half of it 1.012,
a quarter 1.015; at 4 bits 1.117, 1.084 and 1.099."""


def slope(stats: UnitStatistics) -> float:
    """beta: by which power of its input's energy a token's loss at the shallowest depth grows.

    The loss of a token is taken for exponentially distributed about ``exp(a + beta * log(mean(x**2)))``, which a
    squared Gaussian's likelihood nearly is; a and beta are the likeliest, and ``_TRUST`` of beta is returned.
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


def fit(stats: UnitStatistics, profile: SliceProfile, beta: float) -> tuple[F32, F32]:
    """The rule of one unit: float32 bias [E - 1] and norm_gain [E - 1] of RouterParams."""
    spread = np.log(np.mean(stats.mean_square.astype(np.float64) ** beta))
    bias = np.log(average_gain(stats, profile)) - spread
    return bias.astype(np.float32), np.full(profile.depths - 1, beta, np.float32)
