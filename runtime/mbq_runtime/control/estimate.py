"""Coefficients that are learned from one sample after the other: recursive least squares with forgetting.

This is a Kalman filter whose state is the coefficients of a linear equation.  The coefficients drift, so that old
samples count less.  Source: Welch and Bishop, "An Introduction to the Kalman Filter", equations 1.9 to 1.13.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Vector = tuple[float, ...]


@dataclass(frozen=True)
class Estimate:
    """Coefficients of ``y = sum(c * x)``, and how well they are known.

    >>> line = Estimate((0.0, 0.0), ((100.0, 0.0), (0.0, 100.0)))
    >>> for x in (1.0, 2.0, 3.0):
    ...     line = line.after((1.0, x), 5.0 + 2.0 * x, noise=1e-3)
    >>> [round(c, 2) for c in line.mean]
    [5.0, 2.0]

    Args:
        mean: the coefficients.
        covariance: their covariance, a row for each coefficient.
    """

    mean: Vector
    covariance: tuple[Vector, ...]

    @classmethod
    def independent(cls, mean: Vector, deviations: Vector) -> Estimate:
        """Coefficients that are known independently of each other.

        Args:
            mean: the coefficients.
            deviations: standard deviation of each.
        """
        size = range(len(mean))
        return cls(mean, tuple(tuple(deviations[i] ** 2 if i == j else 0.0 for j in size) for i in size))

    def value(self, x: Sequence[float]) -> float:
        """The expected y.

        Args:
            x: one value for each coefficient.
        """
        return math.fsum(c * v for c, v in zip(self.mean, x, strict=True))

    def deviation(self, x: Sequence[float]) -> float:
        """Standard deviation of the expected y.

        Args:
            x: one value for each coefficient.
        """
        return math.sqrt(max(_dot(x, _times(self.covariance, x)), 0.0))

    def drifted(self, directions: Sequence[tuple[Vector, float]], most: Vector) -> Estimate:
        """The estimate after a time in which the coefficients could change.

        Args:
            directions: pairs of a direction and the variance that the time adds along it.
            most: largest variance of each coefficient; more is not forgotten.
        """
        size = range(len(self.mean))
        grown = [[self.covariance[i][j] + sum(var * d[i] * d[j] for d, var in directions) for j in size] for i in size]
        scale = [math.sqrt(min(1.0, most[i] / grown[i][i])) if grown[i][i] > 0 else 1.0 for i in size]
        return Estimate(self.mean, tuple(tuple(grown[i][j] * scale[i] * scale[j] for j in size) for i in size))

    def after(self, x: Sequence[float], y: float, noise: float) -> Estimate:
        """The estimate after one more sample.

        Args:
            x: one value for each coefficient.
            y: the measured value.
            noise: variance of the measurement, above 0.
        """
        spread = _times(self.covariance, x)
        total = _dot(x, spread) + noise
        gain = [s / total for s in spread]
        error = y - self.value(x)
        size = range(len(self.mean))
        mean = tuple(c + g * error for c, g in zip(self.mean, gain, strict=True))
        return Estimate(mean, tuple(tuple(self.covariance[i][j] - gain[i] * spread[j] for j in size) for i in size))


def _times(matrix: Sequence[Vector], x: Sequence[float]) -> list[float]:
    return [_dot(row, x) for row in matrix]


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(p * q for p, q in zip(a, b, strict=True))
