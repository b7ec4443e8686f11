"""The number of threads that the model uses while other programs run.

The threads of one token wait for each other.  A thread that shares its core with another program delays all the
others.  Two threads on one free core and one busy core are therefore slower than one thread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from mbq_runtime.sensing.readings import Readings

_SMOOTH_S = 1.2
_RISE_S = 2.0  # cores must be free for this long before more threads use them
_ROOM = 0.75  # share of a core that must be free for one more thread


@dataclass(frozen=True)
class Threads:
    """The number of threads to use now, and what decides it.

    Args:
        most: number of threads that the engine was loaded with.
        cpus: number of processors on which this process may run.
        count: number of threads to use now.
        left_cpus: processors that other programs leave free, smoothed; None is unknown.
        roomy_s: time in s for which there was room for one more thread.
    """

    most: int
    cpus: int
    count: int
    left_cpus: float | None = None
    roomy_s: float = 0.0

    @classmethod
    def of(cls, most: int, cpus: int) -> Threads:
        """The state before the first reading: all threads.

        Args:
            most: number of threads that the engine was loaded with.
            cpus: number of processors on which this process may run.
        """
        return cls(most, cpus, most)

    def after(self, readings: Readings, elapsed_s: float) -> Threads:
        """The state after new readings.

        The count falls at once when the smoothed reading falls.  It rises after some time with room for one more
        thread, to what then fits.  Without a reading all threads are used.

        Args:
            readings: the new readings.
            elapsed_s: time in s since the last readings.
        """
        left_cpus = _left_cpus(readings, self.cpus)
        if left_cpus is None:
            return Threads.of(self.most, self.cpus)
        if self.left_cpus is not None:
            left_cpus = self.left_cpus + (1 - math.exp(-elapsed_s / _SMOOTH_S)) * (left_cpus - self.left_cpus)
        now = replace(self, left_cpus=left_cpus)
        fitting = max(1, int(left_cpus + 0.5))
        if fitting < self.count:
            return replace(now, count=fitting, roomy_s=0.0)
        if self.count == self.most or left_cpus < self.count + _ROOM:
            return replace(now, roomy_s=0.0)
        roomy_s = self.roomy_s + elapsed_s
        if roomy_s < _RISE_S:
            return replace(now, roomy_s=roomy_s)
        return replace(now, count=min(max(self.count + 1, int(left_cpus + 1 - _ROOM)), self.most), roomy_s=0.0)

    def describe(self, before: int) -> str:
        """The reason for a new count, as text for people.

        Args:
            before: number of threads before the change.
        """
        left = "?" if self.left_cpus is None else f"{self.left_cpus:.1f}"
        return f"threads: {before} to {self.count}, {left} of {self.cpus} processors are free for this program"


def _left_cpus(r: Readings, cpus: int) -> float | None:
    """The lower of two: the cgroup's limit, and the processors minus what other programs use.  None is unknown."""
    known = [] if r.available_cpus is None else [r.available_cpus]
    if r.foreign_cpu_fraction is not None:
        known.append(cpus * (1 - r.foreign_cpu_fraction))
    known = [value for value in known if math.isfinite(value)]
    return min(known, default=None)
