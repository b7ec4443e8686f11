"""Energy per token, measured by the board's own power sensor, with what is known about its error."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .learned import Learned
from .policy import Policy

_NO_WATTS = 0.05  # a smaller share of the power is none that a battery or a heat sink would notice


@dataclass(frozen=True)
class Energy:
    """Energy of the tokens so far.  It includes the power of the idle board.

    >>> Energy().add(power_w=6.0, spent_s=2.0, tokens=24).joules_per_token
    0.5

    Args:
        joules: energy in J, over the periods in which the power was known.
        tokens: number of tokens made in these periods.
        squares: sum over the periods of the squared energy over the tokens, in J squared.
        periods: number of these periods.
    """

    joules: float = 0.0
    tokens: int = 0
    squares: float = 0.0
    periods: int = 0

    def add(self, power_w: float | None, spent_s: float, tokens: int) -> Energy:
        """The energy after one more period.

        Args:
            power_w: power in W; None is unknown, and the period is ignored.
            spent_s: length of the period in s.
            tokens: number of tokens made in it.
        """
        if power_w is None or tokens == 0:
            return self
        joules = power_w * spent_s
        return Energy(self.joules + joules, self.tokens + tokens, self.squares + joules**2 / tokens, self.periods + 1)

    @property
    def joules_per_token(self) -> float | None:
        """J per token; None when no sensor measured the power of any token."""
        return self.joules / self.tokens if self.tokens else None

    @property
    def error_j(self) -> float | None:
        """Standard error of ``joules_per_token`` in J, by how much the periods differ; None for fewer than two.

        The error of the sensor itself is not in it.
        """
        mean = self.joules_per_token
        if mean is None or self.periods < 2:
            return None
        return math.sqrt(max(self.squares / self.tokens - mean**2, 0.0) / (self.periods - 1))


def describe(joules_per_token: float | None, error_j: float | None = None) -> str:
    """The energy as text for people.

    Args:
        joules_per_token: J per token; None is unknown.
        error_j: its standard error in J; None is unknown.
    """
    if joules_per_token is None:
        return "unknown (no power sensor)"
    error = "" if error_j is None else f" ± {error_j:.1g}"
    return f"{joules_per_token:.3g}{error} J/token"


def describe_saving(learned: Learned, policy: Policy, threads: int) -> str | None:
    """What the floor would save against the ceiling without pause, as text for people; None while it is unknown.

    Fewer bits read fewer bytes, so a token takes less time.  The cores are as busy as before, so the board draws about
    as many watts: the same energy makes more tokens.

    Args:
        learned: what is known about the board.
        policy: a policy that has bounds and the bytes of its bundle.
        threads: number of threads of the engine.
    """
    line, watts = learned.token_time(threads), learned.watts
    if not line.is_known or not watts.is_known or len(policy.bytes_at) < 2:
        return None
    low, high = policy.bounds
    low_s, high_s = (line.at(policy.part(bits)) for bits in (low, high))
    low_w, high_w = (
        watts.at(1.0, policy.bytes_of(bits) * 1e-9 / token_s) for bits, token_s in ((low, low_s), (high, high_s))
    )
    if high_w <= 0:
        return None
    joules, power = 1 - low_w * low_s / (high_w * high_s), 1 - low_w / high_w
    text = f"{low:g} bits instead of {high:g} save {joules:.0%} of the energy of a token and {power:.0%} of the watts"
    idle = f"; the idle board draws {watts.idle_w:.1f} W"
    return text + (", so they cool nothing without pauses" if power < _NO_WATTS else "") + idle
