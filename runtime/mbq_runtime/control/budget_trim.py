"""Holds the realised average of bits at the budget.

Routers reach a budget on average over the texts they were calibrated on; on the text at hand they may
use a little more or less.
"""

from __future__ import annotations

from dataclasses import dataclass

_TOKENS = 200  # a lasting difference is made up for within so many tokens, about
_MOST_BITS = 0.5


@dataclass(frozen=True)
class BudgetTrim:
    """trim: what is asked for beyond the budget, in bits."""

    budget: float
    trim: float = 0.0

    def at(self, budget: float) -> BudgetTrim:
        """A new budget starts without trim: how far routers are off differs from budget to budget."""
        return self if budget == self.budget else BudgetTrim(budget)

    def after(self, used_bits: float, tokens: int = 1) -> BudgetTrim:
        """So many more tokens that used ``used_bits`` on average."""
        trim = self.trim + (self.budget - used_bits) * min(1.0, tokens / _TOKENS)
        return BudgetTrim(self.budget, min(max(trim, -_MOST_BITS), _MOST_BITS))

    def request(self, low: float, high: float) -> float:
        """What to ask of the engine, within its range."""
        return min(max(self.budget + self.trim, low), high)
