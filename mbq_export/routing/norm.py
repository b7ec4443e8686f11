"""The norm rule: a slice's worth to a token is the unit's average worth times the input's energy.

``score = log(gain per bit and parameter) + log(mean(x**2) / its average)``: nothing is read but the
input itself, and one threshold over all units is at once a static allocation between units and a
choice between tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.profile import SliceProfile

from .statistics import UnitStatistics

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


def fit(stats: UnitStatistics, profile: SliceProfile) -> tuple[F32, F32]:
    """The rule of one unit: float32 bias [E - 1] and norm_gain [E - 1] of RouterParams."""
    bias = np.log(average_gain(stats, profile)) - np.log(float(stats.mean_square.mean(dtype=np.float64)))
    return bias.astype(np.float32), np.ones(profile.depths - 1, np.float32)
