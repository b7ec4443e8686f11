"""The policies: one row each.  A policy says which triggers lower the budget, and how far it can go."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import pairwise
from typing import NamedTuple

from mbq_runtime.bundle.manifest import Manifest
from mbq_runtime.errors import UsageError


class Band(NamedTuple):
    """The range of a trigger's value in which its pressure goes from 0 to 1.

    start: value at which the pressure is still 0; full: value from which it is 1.
    """

    start: float
    full: float

    def pressure(self, value: float) -> float:
        """The pressure, from 0 to 1.

        Args:
            value: value of the trigger, in the same unit as ``start`` and ``full``.
        """
        return min(max((value - self.start) / (self.full - self.start), 0.0), 1.0)


@dataclass(frozen=True)
class Policy:
    """How the budget follows the board.

    >>> from dataclasses import replace
    >>> replace(find_policy("auto"), min_tps=20.0).bands["heat"]
    Band(start=-3.0, full=1.0)

    Args:
        name: word that selects it, as in ``--policy auto``.
        help: one line for people.
        bands: the triggers that it uses, by name; see ``TRIGGERS``.  Other triggers are ignored.
        floor_bits: lowest budget, in average bits per weight; None: the quality floor of the bundle.
        ceiling_bits: highest budget, in average bits per weight; None: the highest of the bundle.
        min_tps: speed goal in tokens/s; bits are given up to reach it.
        last_until_s: time until which the battery must last, in s on the clock of ``step``.
        kept_speed: share of the speed without pressure that is held while something slows the board, 0 to 1.
        reader_tps: speed in tokens/s that the reader of a reply needs at most; None: somebody waits for every token.
        bytes_at: pairs of a budget and the bytes of weights that a token reads at it; ``within`` sets it.
        threads: number of threads that the engine was loaded with; the governor sets it.
        speculates: whether tokens are guessed under pressure, before bits are given; the governor sets it.

    Raises:
        UsageError: ``min_tps``, ``reader_tps`` or ``last_until_s`` is not a usable number.
    """

    name: str
    help: str
    bands: Mapping[str, Band] = field(default_factory=dict)
    floor_bits: float | None = None
    ceiling_bits: float | None = None
    min_tps: float | None = None
    last_until_s: float | None = None
    kept_speed: float = 0.8
    reader_tps: float | None = None
    bytes_at: tuple[tuple[float, int], ...] = ()
    threads: int | None = None
    speculates: bool = False

    def __post_init__(self) -> None:
        for name, tps in (("min_tps", self.min_tps), ("reader_tps", self.reader_tps)):
            if tps is not None and not 0 < tps < math.inf:
                raise UsageError(f"{name} {tps}: needed a number above 0")
        if self.last_until_s is not None and not math.isfinite(self.last_until_s):
            raise UsageError(f"last_until_s {self.last_until_s}: needed a number of seconds")

    def within(self, manifest: Manifest) -> Policy:
        """The same policy with the bounds and sizes of a bundle.

        Args:
            manifest: the bundle's manifest.

        Raises:
            UsageError: the bundle does not have these bounds.
        """
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
        """(floor, ceiling) in average bits per weight.

        Raises:
            UsageError: the policy has no bounds, because ``within`` was not called.
        """
        if self.floor_bits is None or self.ceiling_bits is None:
            raise UsageError(f"policy {self.name} has no bounds; use policy.within(manifest)")
        return self.floor_bits, self.ceiling_bits

    def part(self, bits: float) -> float:
        """Bytes of weights that a token reads at a budget, over its bytes at the highest budget of the bundle.

        Without a table of bytes it is the share of the ceiling's bits.

        Args:
            bits: the budget, in average bits per weight.
        """
        if len(self.bytes_at) < 2:
            return min(max(bits / self.bounds[1], 1e-3), 1.0)
        return min(max(self.bytes_of(bits) / self.bytes_at[-1][1], 1e-3), 1.0)

    def bytes_of(self, bits: float) -> float:
        """Bytes of weights that a token reads at a budget, by a line between the known ones; 0 without a table.

        Args:
            bits: the budget, in average bits per weight.
        """
        if len(self.bytes_at) < 2:
            return 0.0
        pairs = pairwise(self.bytes_at)
        (low, least), (high, most) = next((pair for pair in pairs if bits <= pair[1][0]), self.bytes_at[-2:])
        return max(least + (most - least) * (bits - low) / (high - low), 0.0)


def quality_floor(manifest: Manifest) -> float:
    """The lowest average bits per weight at which the bundle still writes acceptable text.

    Args:
        manifest: the bundle's manifest.
    """
    return max(manifest.budget.min_bits, min(manifest.quality.floor_bits, manifest.budget.max_bits))


# Bands of the policies that trade quality against heat, load, energy and memory.  A need replaces the band of its
# trigger as soon as the controller knows the board (see ``TRIGGERS``).
_TRADED = {
    "heat": Band(-3.0, 1.0),
    "throttle": Band(0.0, 1.0),
    "supply": Band(0.0, 1.0),
    "clock": Band(0.1, 0.6),
    "battery": Band(0.7, 0.9),
    "cpu": Band(0.15, 0.65),
    "quota": Band(0.1, 0.6),
    "memory": Band(0.0, 1.0),
    "device": Band(1.0, 3.0),
    "saver": Band(0.0, 2.0),
    "hidden": Band(0.0, 1.0),
    "pace": Band(0.3, 0.6),
    "latency": Band(0.0, 1.0),
    "lifetime": Band(0.0, 1.0),
}

POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy("fixed", "one budget at all times"),
        Policy("auto", "full quality until heat, load, memory or a low battery need less", _TRADED),
        Policy(
            "quality",
            "lowers the budget only above the throttle point, or when memory or a goal needs it",
            {name: _TRADED[name] for name in ("memory", "latency", "lifetime")}
            | {"heat": Band(0.0, 4.0), "device": Band(2.0, 4.0)},
        ),
        Policy("battery", "saves energy from the first minute on battery", _TRADED | {"battery": Band(-0.2, 0.5)}),
        Policy(
            "cool",
            "stays well below the throttle point",
            _TRADED | {"heat": Band(-25.0, -10.0), "device": Band(0.0, 2.0)},
        ),
    )
}
"""The policies by name.  Each band is in the unit of its trigger: heat in C above the throttle point, battery as the
share that is used, clock as the share that is lost, cpu and quota as shares of time, device as a state from 0 to 3."""


def find_policy(name: str) -> Policy:
    """A row of ``POLICIES``.

    >>> find_policy("cool").help
    'stays well below the throttle point'

    Args:
        name: one of "fixed", "auto", "quality", "battery", "cool".

    Raises:
        UsageError: there is no such policy.
    """
    if name not in POLICIES:
        raise UsageError(f"policy {name!r}: needed one of {', '.join(POLICIES)}")
    return POLICIES[name]


def seconds_until(text: str, now: datetime) -> float:
    """Seconds from now to a time of day, or the seconds of a duration.

    >>> seconds_until("18:00", datetime(2026, 11, 1, 16, 30))
    5400.0
    >>> seconds_until("40min", datetime(2026, 11, 1))
    2400.0

    Args:
        text: a time of day such as "18:00", today or tomorrow, or a duration such as "2.5h" or "40min".
        now: the time now.

    Raises:
        UsageError: ``text`` is neither.
    """
    if clock := re.fullmatch(r"([01]?\d|2[0-3]):([0-5]\d)", text.strip()):
        then = now.replace(hour=int(clock[1]), minute=int(clock[2]), second=0, microsecond=0)
        return ((then if then > now else then + timedelta(days=1)) - now).total_seconds()
    if span := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(h|min)", text.strip()):
        return float(span[1]) * {"h": 3600, "min": 60}[span[2]]
    raise UsageError(f"{text!r} is no time: needed a time of day such as 18:00, or a duration such as 2.5h or 40min")
