"""Chooses a token from logits, for every kind of engine."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.errors import BundleError

from .generation import Sampling


def check_finite(logits: NDArray[np.float32], where: object) -> None:
    """Refuse to choose a token from logits that are no numbers.

    Args:
        logits: float32 [vocab].  -inf is permitted for tokens that are not the likeliest.
        where: the bundle, for the message.

    Raises:
        BundleError: a logit is NaN, or the largest one is infinite.
    """
    peak = float(logits.max())  # NaN where any of them is
    if not math.isfinite(peak):
        raise BundleError(f"{where}: the model's logits are not finite ({peak}); run mbq verify, or export it again")


class Sampler:
    """Chooses one token after another.

    sampling: how; None for the likeliest token.
    where: the bundle, for messages.

    >>> Sampler(None).choose(np.array([0.1, 2.0, 0.3], np.float32))
    1
    """

    def __init__(self, sampling: Sampling | None, where: object = "the bundle") -> None:
        self._where = where
        self._sampling = sampling or Sampling()
        self._random = np.random.default_rng(self._sampling.seed)

    def choose(self, logits: NDArray[np.float32]) -> int:
        """Choose a token.

        Args:
            logits: float32 [vocab].

        Returns:
            The token's id.

        Raises:
            BundleError: the logits are not finite.
        """
        check_finite(logits, self._where)
        if self._sampling.is_greedy:
            return int(logits.argmax())
        tokens, weights = candidates(logits, self._sampling)
        total = np.cumsum(weights, dtype=np.float64)
        at = int(np.searchsorted(total, self._random.random() * total[-1], side="right"))
        return int(tokens[min(at, len(tokens) - 1)])


def candidates(logits: NDArray[np.float32], sampling: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The tokens that may be drawn, and how likely they are.

    Args:
        logits: float32 [vocab]; the largest one is finite.
        sampling: with a temperature that is not greedy.

    Returns:
        int64 [n]: ids; float32 [n]: weights, of which the largest is 1.
    """
    s = sampling
    scores = (logits - logits.max()) / np.float32(s.temperature)
    tokens = np.arange(len(scores))
    if 0 < s.top_k < len(scores):
        least = np.partition(scores, len(scores) - s.top_k)[len(scores) - s.top_k]
        tokens = np.flatnonzero(scores >= least)
    weights = np.exp(scores[tokens])
    if s.top_p < 1:
        # The tokens below this weight have less than 1 - top_p together, so only the others are sorted.
        likely = np.flatnonzero(weights >= (1 - s.top_p) * weights.sum(dtype=np.float64) / len(weights))
        order = likely[np.argsort(-weights[likely], kind="stable")]
        total = np.cumsum(weights[order], dtype=np.float64)
        # Keep the fewest tokens whose total probability reaches top_p.
        kept = int(np.searchsorted(total, s.top_p * weights.sum(dtype=np.float64))) + 1
        tokens, weights = tokens[order[:kept]], weights[order[:kept]]
    return tokens, weights
