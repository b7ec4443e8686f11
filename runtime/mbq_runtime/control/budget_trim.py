"""A correction that keeps the average bits that were used equal to the budget.

The routers reach a budget on average over their calibration texts.  On other texts they use slightly more or fewer
bits.
"""

from __future__ import annotations

from dataclasses import dataclass

_TOKENS = 200  # a lasting difference is corrected within about this many tokens
_MOST_BITS = 0.5


@dataclass(frozen=True)
class BudgetTrim:
    """The correction for one budget.

    >>> trim = BudgetTrim(budget=5.0).after(used_bits=4.0, tokens=20)
    >>> round(trim.request(low=3.0, high=8.0), 2)
    5.1

    Args:
        budget: average bits per weight that are wanted.
        trim: bits that are added to the budget, from -0.5 to 0.5.
    """

    budget: float
    trim: float = 0.0

    def at(self, budget: float) -> BudgetTrim:
        """The correction for another budget.  It starts at 0, because the difference varies with the budget.

        Args:
            budget: average bits per weight.
        """
        return self if budget == self.budget else BudgetTrim(budget)

    def after(self, used_bits: float, tokens: int = 1) -> BudgetTrim:
        """The correction after more tokens.

        Args:
            used_bits: average bits per weight that these tokens used.
            tokens: number of these tokens.
        """
        trim = self.trim + (self.budget - used_bits) * min(1.0, tokens / _TOKENS)
        return BudgetTrim(self.budget, min(max(trim, -_MOST_BITS), _MOST_BITS))

    def request(self, low: float, high: float) -> float:
        """The budget to set, in average bits per weight.

        Args:
            low: lowest budget of the engine, in bits.
            high: highest budget of the engine, in bits.
        """
        return min(max(self.budget + self.trim, low), high)
