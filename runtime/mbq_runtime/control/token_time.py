"""The time of a token as a line in the bytes that it reads, learned while the model decodes.

``seconds = a + b * bytes``: ``a`` is the work that does not depend on the budget, ``b`` the time to read one byte.
A budget in use gives one point of the line only.  So the share of the time that depends on the bytes starts at what
was measured on other machines, and moves when budgets change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .estimate import Estimate

_SHARE = 0.62  # reading over the whole time of a token at the ceiling, before anything is learned
_SHARE_SD = 0.15
_LEAST_SHARE, _MOST_SHARE = 0.1, 1.0
_NOISE = 0.05  # standard deviation of a measured time, as a share of it
_LEVEL_DRIFT = 0.004  # a board that changes is followed with a time constant of about 10 s
_SHARE_DRIFT = 0.001
_MOST_STEP = 0.5  # largest surprise of one sample, as a share of the expected time
_KNOWN_S = 5.0
_FASTEST_S, _SLOWEST_S = 1e-6, 1e3
"""Times of a token outside these bounds, in s, are no times."""


@dataclass(frozen=True)
class TokenTime:
    """The line, for one number of threads.  Bytes are given as a share of the bytes at the ceiling.

    >>> line = TokenTime()
    >>> for _ in range(50):
    ...     line = line.after(1.0, 0.010, elapsed_s=0.5).after(0.5, 0.006, elapsed_s=0.5)
    >>> round(line.at(0.75), 4), line.is_known
    (0.008, True)

    Args:
        line: coefficients a and b, in s; None before the first sample.
        learned_s: time in s over which samples came.
    """

    line: Estimate | None = None
    learned_s: float = 0.0

    @property
    def is_known(self) -> bool:
        """Whether there were samples for some seconds."""
        return self.learned_s >= _KNOWN_S

    @property
    def share(self) -> float:
        """Share of the time at the ceiling that depends on the bytes, 0.1 to 1."""
        if self.line is None:
            return _SHARE
        fixed, read = self.line.mean
        whole = fixed + read
        return min(max(read / whole, _LEAST_SHARE), _MOST_SHARE) if whole > 0 else _SHARE

    def shape(self, part: float) -> float:
        """Time at a budget over the time at the ceiling.

        Args:
            part: bytes of a token at the budget over its bytes at the ceiling.
        """
        return 1 - self.share + self.share * part

    def at(self, part: float) -> float:
        """Time of a token in s, when nothing presses.

        Args:
            part: bytes of a token at the budget over its bytes at the ceiling.
        """
        whole_s = 0.0 if self.line is None else sum(self.line.mean)
        return max(whole_s, _FASTEST_S) * self.shape(part)

    def after(self, part: float, token_s: float, elapsed_s: float) -> TokenTime:
        """The line after one more sample.  A time that cannot be one of a token is left out.

        Args:
            part: bytes of a token at the budget over its bytes at the ceiling.
            token_s: mean time of a token in s.
            elapsed_s: time in s since the last sample.
        """
        if not (_FASTEST_S <= token_s <= _SLOWEST_S and 0 < part <= 1):
            return self
        if self.line is None:
            return TokenTime(_first(part, token_s), 0.0)
        expected_s, whole_s = self.at(part), self.at(1.0)
        token_s = min(max(token_s, expected_s * (1 - _MOST_STEP)), expected_s * (1 + _MOST_STEP))
        fixed, read = 1 - self.share, self.share
        drift = [
            ((fixed * whole_s, read * whole_s), _LEVEL_DRIFT**2 * elapsed_s),
            ((whole_s, -whole_s), _SHARE_DRIFT**2 * elapsed_s),
        ]
        line = self.line.drifted(drift, (whole_s**2, whole_s**2))
        line = line.after((1.0, part), token_s, (_NOISE * expected_s) ** 2)
        return TokenTime(_bounded(line), min(self.learned_s + elapsed_s, 10 * _KNOWN_S))


def _first(part: float, token_s: float) -> Estimate:
    whole_s = token_s / (1 - _SHARE + _SHARE * part)
    # Uncertain along two directions: the whole time, and the share of it that is read.
    level, share = _NOISE * whole_s, _SHARE_SD * whole_s
    a, b = (1 - _SHARE) * level, _SHARE * level
    return Estimate(
        ((1 - _SHARE) * whole_s, _SHARE * whole_s),
        ((a * a + share**2, a * b - share**2), (a * b - share**2, b * b + share**2)),
    )


def _bounded(line: Estimate) -> Estimate:
    """The line with a whole time within bounds, and a share within bounds."""
    whole_s = min(max(math.fsum(line.mean), _FASTEST_S), _SLOWEST_S)
    read = min(max(line.mean[1], _LEAST_SHARE * whole_s), _MOST_SHARE * whole_s)
    return Estimate((whole_s - read, read), line.covariance)
