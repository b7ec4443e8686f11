"""Energy per token from the board's own power sensor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Energy:
    """Joules drawn while tokens were made.  joules, tokens: of the stretches in which the power was known."""

    joules: float = 0.0
    tokens: int = 0

    def add(self, power_w: float | None, spent_s: float, tokens: int) -> Energy:
        """With ``tokens`` more that took ``spent_s`` at ``power_w``; None is unknown, and not counted."""
        if power_w is None or tokens == 0:
            return self
        return Energy(self.joules + power_w * spent_s, self.tokens + tokens)

    @property
    def joules_per_token(self) -> float | None:
        """None when no sensor has measured any token."""
        return self.joules / self.tokens if self.tokens else None


def describe(joules_per_token: float | None) -> str:
    """For people."""
    return "unknown (no power sensor)" if joules_per_token is None else f"{joules_per_token:.3g} J/token"
