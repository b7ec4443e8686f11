"""The temperature of a board as a first-order model, learned while the board warms and cools.

``dT/dt = (level + gain * drive - T) / tau``.  The drive is what heats: the power, or else the share of the time in
which the cores decode.  Source: Incropera and DeWitt, "Fundamentals of Heat and Mass Transfer", section 5.1 (lumped
capacitance).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from .estimate import Estimate

_BLOCK_S = 8.0  # temperatures and drives are averaged over this time, so that noise of the sensor counts little
_KNOWN_BLOCKS = 6
_SCALE_C = 50.0  # a coefficient for T / 50 has the size of the others
_TAU_S = 150.0
_LEAST_TAU_S, _MOST_TAU_S = 20.0, 2000.0
_COLDEST_C, _HOTTEST_C = -40.0, 300.0
_MOST_GAIN_C = 300.0  # at a drive of 1
_RATE_NOISE = 0.05  # C/s
_MOST_RATE = 2.0  # C/s; a sensor that jumps by more tells nothing about heat
_SURPRISE = 3.0  # standard deviations
_PRIOR = (35.0 / _TAU_S, 40.0 / _TAU_S, -_SCALE_C / _TAU_S)
_PRIOR_SD = (0.3, 0.3, 0.2)
_DRIFT_SD = (0.004, 0.004, 0.002)  # in one block
_MOST = tuple(sd**2 for sd in _PRIOR_SD)


@dataclass(frozen=True)
class _Block:
    """Means over some time: seconds, temperature in C times seconds, drive times seconds."""

    seconds: float = 0.0
    temp: float = 0.0
    drive: float = 0.0


@dataclass(frozen=True)
class Heat:
    """The model.

    >>> heat, temp_c = Heat(), 30.0
    >>> for second in range(600):
    ...     heat = heat.after(temp_c, 1.0, elapsed_s=1.0)
    ...     temp_c += (80.0 - temp_c) / 200.0
    >>> heat.is_known, 76 < heat.settled_c(1.0) < 84
    (True, True)

    Args:
        rate: coefficients of dT/dt for 1, the drive and the temperature.
        blocks: number of blocks that were learned from.
        last: the last whole block.
        now: the block in progress.
    """

    rate: Estimate = field(default_factory=lambda: Estimate.independent(_PRIOR, _PRIOR_SD))
    blocks: int = 0
    last: _Block | None = None
    now: _Block = _Block()

    @property
    def is_known(self) -> bool:
        """Whether there were samples for most of a minute."""
        return self.blocks >= _KNOWN_BLOCKS

    @property
    def tau_s(self) -> float:
        """Time constant in s, 20 to 2000."""
        slope = -self.rate.mean[2] / _SCALE_C
        return min(max(1 / slope, _LEAST_TAU_S), _MOST_TAU_S) if slope > 1 / _MOST_TAU_S else _MOST_TAU_S

    def settled_c(self, drive: float) -> float:
        """Temperature in C that the board reaches after a long time.

        Args:
            drive: power in 10 W, or share of the time in which the cores decode.
        """
        gain_c = min(max(self.rate.mean[1] * self.tau_s, 0.0), _MOST_GAIN_C)
        return min(max(self.rate.mean[0] * self.tau_s + gain_c * drive, _COLDEST_C), _HOTTEST_C)

    def forecast_c(self, temp_c: float, drive: float, ahead_s: float) -> float:
        """Temperature in C after a time at a drive.

        Args:
            temp_c: temperature now.
            drive: see ``settled_c``.
            ahead_s: the time in s.
        """
        settled_c = self.settled_c(drive)
        return settled_c + (temp_c - settled_c) * math.exp(-ahead_s / self.tau_s)

    def after(self, temp_c: float, drive: float, elapsed_s: float) -> Heat:
        """The model after one more reading.

        Args:
            temp_c: temperature in C.
            drive: mean drive since the last reading, see ``settled_c``.
            elapsed_s: time in s since the last reading; after more than a block the model starts from new blocks.
        """
        if not (_COLDEST_C < temp_c < _HOTTEST_C and 0 <= drive < 1e3):
            return self
        if elapsed_s > _BLOCK_S:
            return replace(self, last=None, now=_Block())
        now = _Block(
            self.now.seconds + elapsed_s, self.now.temp + temp_c * elapsed_s, self.now.drive + drive * elapsed_s
        )
        if now.seconds < _BLOCK_S:
            return replace(self, now=now)
        whole = replace(self, last=now, now=_Block())
        return whole if self.last is None else whole._learn(self.last, now)

    def _learn(self, before: _Block, after: _Block) -> Heat:
        before_c, after_c = before.temp / before.seconds, after.temp / after.seconds
        drive = (before.drive + after.drive) / (before.seconds + after.seconds)
        rate = (after_c - before_c) / ((before.seconds + after.seconds) / 2)
        if abs(rate) > _MOST_RATE:
            return self
        x = (1.0, drive, (before_c + after_c) / 2 / _SCALE_C)
        surprise = abs(rate - self.rate.value(x)) / math.hypot(self.rate.deviation(x), _RATE_NOISE)
        # A surprise means that the board changed, for example its fan: much is forgotten at once.
        sds = _PRIOR_SD if surprise > _SURPRISE else _DRIFT_SD
        axes = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
        known = self.rate.drifted([(axis, sd**2) for axis, sd in zip(axes, sds, strict=True)], _MOST)
        return replace(self, rate=_bounded(known.after(x, rate, _RATE_NOISE**2)), blocks=min(self.blocks + 1, 1000))


def _bounded(rate: Estimate) -> Estimate:
    """The coefficients within bounds: a board that warms faster when it is driven, and cools faster when it is hot."""
    level, gain, slope = rate.mean
    slope = min(max(slope, -_SCALE_C / _LEAST_TAU_S), -_SCALE_C / _MOST_TAU_S)
    return Estimate((min(max(level, -10.0), 10.0), min(max(gain, 0.0), 10.0), slope), rate.covariance)
