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
from torch.nn import functional

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
    first = torch.randn(MLP_HIDDEN, k, generator=generator) / k**0.5
    parameters = _Parameters(first, target.mean(0))
    # The same batches again and again: to gather their rows takes longer than a step.
    order = torch.randperm(tokens, generator=generator)
    batches = max(1, tokens // _BATCH)
    batches_of_x, batches_of_target = (values[order].float().chunk(batches) for values in (x, target))
    for step in range(_STEPS):
        parameters.step(batches_of_x[step % batches], batches_of_target[step % batches])
    w1, b1, w2, _ = parameters.parts
    with torch.no_grad():
        stored = w1.half()
        learned = functional.silu(x.float() @ stored.float().T + b1) @ w2.T
        score = (learned + torch.from_numpy(norm_gain) * mean_square.log()[:, None]).double()
        # The average of a slice's scores is its measured gain.
        average = np.log(norm.average_gain(stats, profile)) - (score.logsumexp(0) - np.log(tokens)).numpy()
    return average.astype(np.float32), norm_gain, MlpWeights(stored.numpy(), b1.numpy(), w2.numpy())


class _Parameters:
    """The MLP while it is trained, with an offset for each of its S outputs.

    Its gradient is written out: autograd and an optimizer of four tensors took four times as long (docs/log.md).

    parts: views of one tensor: w1 [H, K], b1 [H], w2 [S, H], offset [S].

    Args:
        first: w1 at first.
        offset: the offset at first.
    """

    def __init__(self, first: torch.Tensor, offset: torch.Tensor) -> None:
        hidden, slices = len(first), len(offset)
        initial = [first, torch.zeros(hidden), torch.zeros(slices, hidden), offset]
        self._all = torch.cat([part.flatten() for part in initial])
        self._gradient = torch.empty_like(self._all)
        self.parts, self._gradients = (
            [part.view(of.shape) for part, of in zip(whole.split([of.numel() for of in initial]), initial, strict=True)]
            for whole in (self._all, self._gradient)
        )
        self._all.grad = self._gradient
        self._optimizer = torch.optim.AdamW([self._all], lr=_LEARNING_RATE, weight_decay=1e-2, fused=True)

    def step(self, x: torch.Tensor, target: torch.Tensor) -> None:
        """One step against the mean squared error.

        Args:
            x: float32 [tokens, K].
            target: float32 [tokens, S].
        """
        (w1, b1, w2, offset), (to_w1, to_b1, to_w2, to_offset) = self.parts, self._gradients
        before = x @ w1.T + b1
        sigmoid = before.sigmoid()
        inner = before * sigmoid
        error = (inner @ w2.T + offset - target) * (2 / target.numel())
        to_before = error @ w2 * (sigmoid + inner * (1 - sigmoid))
        torch.mm(to_before.T, x, out=to_w1)
        torch.sum(to_before, 0, out=to_b1)
        torch.mm(error.T, inner, out=to_w2)
        torch.sum(error, 0, out=to_offset)
        self._optimizer.step()


def _unexplained(change: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
    """float32 [T, E - 1]: log of ``change`` less its regression on the log of ``mean_square``."""
    target = torch.log(change / change.mean(0) + 1e-6)
    target -= target.mean(0)
    energy = mean_square.log()[:, None]
    energy -= energy.mean()
    # The closed form: torch.linalg.lstsq does not give the same bits in every run.
    return target - energy * ((energy * target).sum(0) / (energy**2).sum().clamp(min=1e-12))
