"""The learned router: a two-layer MLP that predicts what the next slice would change.

It adds the input's direction to the norm rule.  Its target is the logarithm of ``|dW x|**2``, the energy that a slice
would add to this token's output, less its regression on ``log(mean(x**2))``.  Unlike the slice's effect on the loss,
this target has no noise.  The MLP's input is ``x`` scaled to unit mean square.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mbq_runtime.bundle.slice_profile import SliceProfile

from ..methods import MLP_HIDDEN
from . import norm
from .slice_gains import UnitStatistics

F32 = NDArray[np.float32]

_STEPS = 150
_BATCH = 512
_LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class MlpWeights:
    """Weights of the MLP.

    w1: float16 [H, K].
    b1: float32 [H].
    w2: float32 [E - 1, H].
    """

    w1: NDArray[np.float16]
    b1: F32
    w2: F32


def train(stats: UnitStatistics, profile: SliceProfile, seed: int) -> tuple[F32, F32, MlpWeights]:
    """Train the router of one unit.

    Args:
        stats: of the unit, with its router's inputs.
        profile: the bits of each slice.
        seed: of initial weights and batches.

    Returns:
        bias and norm_gain of ``RouterParams``, both float32 [E - 1], and the MLP.
    """
    assert stats.inputs is not None
    _, norm_gain = norm.rule(stats, profile, norm.slope(stats))
    mean_square = torch.from_numpy(stats.mean_square)
    x = torch.from_numpy(stats.inputs)
    target = _unexplained(torch.from_numpy(stats.change), mean_square)

    generator = torch.Generator().manual_seed(seed)
    tokens, k = x.shape
    w1 = (torch.randn(MLP_HIDDEN, k, generator=generator) / k**0.5).requires_grad_()
    b1 = torch.zeros(MLP_HIDDEN, requires_grad=True)
    w2 = torch.zeros(target.shape[1], MLP_HIDDEN, requires_grad=True)
    offset = target.mean(0).clone().requires_grad_()
    optimizer = torch.optim.AdamW([w1, b1, w2, offset], lr=_LEARNING_RATE, weight_decay=1e-2)
    for _ in range(_STEPS):
        rows = torch.randint(tokens, (_BATCH,), generator=generator)
        predicted = torch.nn.functional.silu(x[rows].float() @ w1.T + b1) @ w2.T + offset
        loss = ((predicted - target[rows]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        stored = w1.half()
        learned = torch.nn.functional.silu(x.float() @ stored.float().T + b1) @ w2.T
        score = (learned + torch.from_numpy(norm_gain) * mean_square.log()[:, None]).double()
        # The average of a slice's scores is its measured gain.
        average = np.log(norm.average_gain(stats, profile)) - (score.logsumexp(0) - np.log(tokens)).numpy()
    return average.astype(np.float32), norm_gain, MlpWeights(stored.numpy(), b1.detach().numpy(), w2.detach().numpy())


def _unexplained(change: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
    """float32 [T, E - 1]: log of ``change`` less its regression on the log of ``mean_square``."""
    target = torch.log(change / change.mean(0) + 1e-6)
    target -= target.mean(0)
    energy = mean_square.log()[:, None]
    energy -= energy.mean()
    # The closed form: torch.linalg.lstsq does not give the same bits in every run.
    return target - energy * ((energy * target).sum(0) / (energy**2).sum().clamp(min=1e-12))
