"""How many threads the model runs on beside other programs.

A token's work is shared out to threads that wait for one another: one that has to share its core with another
program holds all of them up, so that two threads beside a busy core are slower than one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from mbq_runtime.sensing.readings import Readings

_SMOOTH_S = 1.2
_RISE_S = 5.0  # a further thread must have had its core for this long
_ROOM = 0.75  # of a core that a further thread must find free


@dataclass(frozen=True)
class Threads:
    """most: what the engine was loaded with; cpus: processors this process may be scheduled on; count: to use now;
    left_cpus: what others leave of them, smoothed, None when unknown."""

    most: int
    cpus: int
    count: int
    left_cpus: float | None = None
    roomy_s: float = 0.0

    @classmethod
    def of(cls, most: int, cpus: int) -> Threads:
        """As the engine was loaded."""
        return cls(most, cpus, most)

    def after(self, readings: Readings, elapsed_s: float) -> Threads:
        """One more look.  Falls as soon as the smoothed reading does, rises after a while; unknown is no reason."""
        left_cpus = _left_cpus(readings, self.cpus)
        if left_cpus is None:
            return Threads.of(self.most, self.cpus)
        if self.left_cpus is not None:
            left_cpus = self.left_cpus + (1 - math.exp(-elapsed_s / _SMOOTH_S)) * (left_cpus - self.left_cpus)
        now = replace(self, left_cpus=left_cpus)
        fitting = max(1, round(left_cpus))
        if fitting < self.count:
            return replace(now, count=fitting, roomy_s=0.0)
        if self.count == self.most or left_cpus < self.count + _ROOM:
            return replace(now, roomy_s=0.0)
        roomy_s = self.roomy_s + elapsed_s
        return replace(now, count=self.count + 1, roomy_s=0.0) if roomy_s >= _RISE_S else replace(now, roomy_s=roomy_s)

    def describe(self, before: int) -> str:
        """Why ``count`` is no longer ``before``."""
        left = "?" if self.left_cpus is None else f"{self.left_cpus:.1f}"
        return f"threads: {before} to {self.count}, {left} of {self.cpus} processors are left to this program"


def _left_cpus(r: Readings, cpus: int) -> float | None:
    """A cgroup's limit, or the processors less what others take, whichever is less."""
    known = [] if r.available_cpus is None else [r.available_cpus]
    if r.foreign_cpu_fraction is not None:
        known.append(cpus * (1 - r.foreign_cpu_fraction))
    known = [value for value in known if math.isfinite(value)]
    return min(known, default=None)
