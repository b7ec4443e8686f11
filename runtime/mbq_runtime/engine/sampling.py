"""Chooses a token from logits, for the engines that do not."""

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
        s = self._sampling
        if s.is_greedy:
            return int(logits.argmax())
        count = min(s.top_k or len(logits), len(logits))
        likeliest = np.argpartition(-logits, count - 1)[:count] if count < len(logits) else np.arange(len(logits))
        likeliest = likeliest[np.argsort(-logits[likeliest], kind="stable")]
        scores = logits[likeliest].astype(np.float64)
        weights = np.exp((scores - scores[0]) / s.temperature)
        total = np.cumsum(weights)
        # Keep the fewest tokens whose total probability reaches top_p.
        kept = int(np.searchsorted(total, s.top_p * total[-1])) + 1 if s.top_p < 1 else len(total)
        drawn = self._random.random() * total[min(kept, len(total)) - 1]
        return int(likeliest[min(int(np.searchsorted(total, drawn, side="right")), len(total) - 1)])
