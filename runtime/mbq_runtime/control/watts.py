"""The power of a board by what it decodes, learned from its power sensor.

``watts = idle + cores * share + memory * rate``: the share of the time in which the cores decode, and the GB of weights
that are read in one second.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .estimate import Estimate

_PRIOR = (3.0, 5.0, 0.1)
_PRIOR_SD = (5.0, 10.0, 0.2)
_MOST_W = 2000.0
_NOISE = 0.03  # standard deviation of a reading, as a share of it
_LEAST_NOISE_W = 0.05
_DRIFT_SD = (0.01, 0.01, 0.0005)  # in 1 s
_KNOWN_S = 20.0
_MOST = tuple(sd**2 for sd in _PRIOR_SD)
_AXES = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


@dataclass(frozen=True)
class Watts:
    """The model.

    >>> watts = Watts()
    >>> for share in (0.0, 0.5, 1.0, 0.2) * 20:
    ...     watts = watts.after(4.0 + 6.0 * share, share, 0.0, elapsed_s=1.0)
    >>> round(watts.at(0.8, 0.0), 1), round(watts.idle_w, 1)
    (8.8, 4.0)

    Args:
        line: coefficients in W, W and W a GB/s.
        learned_s: time in s over which samples came.
    """

    line: Estimate = field(default_factory=lambda: Estimate.independent(_PRIOR, _PRIOR_SD))
    learned_s: float = 0.0

    @property
    def is_known(self) -> bool:
        """Whether there were samples for some time."""
        return self.learned_s >= _KNOWN_S

    @property
    def idle_w(self) -> float:
        """Power in W without decoding."""
        return max(self.line.mean[0], 0.0)

    def at(self, share: float, gb_s: float) -> float:
        """Expected power in W.

        Args:
            share: share of the time in which the cores decode, 0 to 1.
            gb_s: weights that are read, in GB/s.
        """
        return min(max(self.line.value((1.0, share, gb_s)), 0.0), _MOST_W)

    def after(self, power_w: float, share: float, gb_s: float, elapsed_s: float) -> Watts:
        """The model after one more reading.  A power that cannot be one is left out.

        Args:
            power_w: power in W.
            share: share of the time in which the cores decoded, 0 to 1.
            gb_s: weights that were read, in GB/s.
            elapsed_s: time in s since the last reading.
        """
        if not (0 < power_w <= _MOST_W and 0 <= share <= 1 and 0 <= gb_s < 1e4):
            return self
        known = self.line.drifted([(a, sd**2 * elapsed_s) for a, sd in zip(_AXES, _DRIFT_SD, strict=True)], _MOST)
        line = known.after((1.0, share, gb_s), power_w, max(_NOISE * power_w, _LEAST_NOISE_W) ** 2)
        mean = tuple(min(max(c, 0.0), _MOST_W) for c in line.mean)
        return replace(self, line=Estimate(mean, line.covariance), learned_s=min(self.learned_s + elapsed_s, 1e3))
