"""Energy per token, measured by the board's own power sensor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Energy:
    """Energy of the tokens so far.

    >>> Energy().add(power_w=6.0, spent_s=2.0, tokens=24).joules_per_token
    0.5

    Args:
        joules: energy in J, over the periods in which the power was known.
        tokens: number of tokens made in these periods.
    """

    joules: float = 0.0
    tokens: int = 0

    def add(self, power_w: float | None, spent_s: float, tokens: int) -> Energy:
        """The energy after one more period.

        Args:
            power_w: power in W; None is unknown, and the period is ignored.
            spent_s: length of the period in s.
            tokens: number of tokens made in it.
        """
        if power_w is None or tokens == 0:
            return self
        return Energy(self.joules + power_w * spent_s, self.tokens + tokens)

    @property
    def joules_per_token(self) -> float | None:
        """J per token; None when no sensor measured the power of any token."""
        return self.joules / self.tokens if self.tokens else None


def describe(joules_per_token: float | None) -> str:
    """The energy as text for people.

    Args:
        joules_per_token: J per token; None is unknown.
    """
    return "unknown (no power sensor)" if joules_per_token is None else f"{joules_per_token:.3g} J/token"
