"""What a controller may trade for what: one row per policy, and the bounds it keeps."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import NamedTuple

from mbq_runtime.bundle.manifest import Manifest
from mbq_runtime.errors import UsageError


class Band(NamedTuple):
    """The values of a signal at which it begins to press and at which it presses with all its weight."""

    start: float
    full: float

    def pressure(self, value: float) -> float:
        """0 to 1."""
        return min(max((value - self.start) / (self.full - self.start), 0.0), 1.0)


@dataclass(frozen=True)
class Policy:
    """How a budget follows the board.

    bands: signals that count, see ``triggers.TRIGGERS``; the others do not.  floor_bits, ceiling_bits: bounds of the
    budget; None is the lowest quality the bundle vouches for, and its highest.  min_tps: tokens/s
    to hold if bits can do it.  last_until_s: when the battery must still hold, on the clock of ``now``.
    bytes_at: (bits, bytes of weights a token reads), from the bundle.  threads: that the engine was loaded with.
    """

    name: str
    help: str
    bands: Mapping[str, Band] = field(default_factory=dict)
    floor_bits: float | None = None
    ceiling_bits: float | None = None
    min_tps: float | None = None
    last_until_s: float | None = None
    bytes_at: tuple[tuple[float, int], ...] = ()
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.min_tps is not None and not 0 < self.min_tps < math.inf:
            raise UsageError(f"min_tps {self.min_tps}: needed a number above 0")
        if self.last_until_s is not None and not math.isfinite(self.last_until_s):
            raise UsageError(f"last_until_s {self.last_until_s}: needed a number of seconds")

    def within(self, manifest: Manifest) -> Policy:
        """The same policy with bounds and sizes of a bundle.  Raises UsageError when they do not fit it."""
        budget = manifest.budget
        asked = (self.floor_bits, self.ceiling_bits)
        low, high = (
            default if bits is None else budget.check(bits, f"{manifest.model.name}, policy {self.name}:")
            for bits, default in zip(asked, (quality_floor(manifest), budget.max_bits), strict=True)
        )
        if low > high:
            if None not in asked:
                raise UsageError(f"floor of {low:g} bits above the ceiling of {high:g} bits; swap them")
            low = high
        sizes = sorted((float(bits), size) for bits, size in manifest.weights.bytes_per_token.items())
        return replace(self, floor_bits=low, ceiling_bits=high, bytes_at=tuple(sizes))

    @property
    def bounds(self) -> tuple[float, float]:
        """(floor, ceiling) in bits.  Raises UsageError before ``within``."""
        if self.floor_bits is None or self.ceiling_bits is None:
            raise UsageError(f"policy {self.name} has no bounds yet; take policy.within(manifest)")
        return self.floor_bits, self.ceiling_bits


def quality_floor(manifest: Manifest) -> float:
    """The lowest average bits at which the bundle still writes acceptable text."""
    return max(manifest.budget.min_bits, min(manifest.quality.floor_bits, manifest.budget.max_bits))


_TRADED = {
    "heat": Band(-5.0, 0.0),
    "throttle": Band(0.0, 1.0),
    "supply": Band(0.0, 1.0),
    "clock": Band(0.1, 0.5),
    "battery": Band(0.7, 0.9),
    "cpu": Band(0.1, 0.3),
    "quota": Band(0.05, 0.3),
    "memory": Band(0.0, 1.0),
    "pace": Band(0.3, 0.6),
    "latency": Band(0.0, 1.0),
    "lifetime": Band(0.0, 1.0),
}

POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy("fixed", "one budget, whatever happens"),
        Policy("auto", "full quality until heat, load, memory or a low battery press", _TRADED),
        Policy(
            "quality",
            "gives way only above the throttle point, and where memory or a goal demands it",
            {name: _TRADED[name] for name in ("memory", "latency", "lifetime")} | {"heat": Band(0.0, 4.0)},
        ),
        Policy("battery", "saves from the first minute on battery", _TRADED | {"battery": Band(-0.2, 0.5)}),
        Policy("cool", "stays well below the throttle point", _TRADED | {"heat": Band(-25.0, -10.0)}),
    )
}
"""Bands, in the unit of each signal: heat in C from the throttle point, battery as the share that is used up,
clock as the share that is lost, cpu and quota as shares of time."""


def find_policy(name: str) -> Policy:
    """A row of ``POLICIES``.  Raises UsageError naming them."""
    if name not in POLICIES:
        raise UsageError(f"policy {name!r}: needed one of {', '.join(POLICIES)}")
    return POLICIES[name]


def seconds_until(text: str, now: datetime) -> float:
    """Seconds from ``now`` to "18:00" (today or tomorrow), or in "2.5h" or "40min".  Raises UsageError."""
    if clock := re.fullmatch(r"([01]?\d|2[0-3]):([0-5]\d)", text.strip()):
        then = now.replace(hour=int(clock[1]), minute=int(clock[2]), second=0, microsecond=0)
        return ((then if then > now else then + timedelta(days=1)) - now).total_seconds()
    if span := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(h|min)", text.strip()):
        return float(span[1]) * {"h": 3600, "min": 60}[span[2]]
    raise UsageError(f"{text!r} is no time: needed a clock time such as 18:00, or a span such as 2.5h or 40min")
