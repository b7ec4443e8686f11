// A correction that keeps the average bits that were used equal to the budget: runtime/mbq_runtime/control/budget_trim.py.

import { clamp } from "./numbers.js";

const TOKENS = 200, MOST_BITS = 0.5;

export class BudgetTrim {
  constructor(budget, trim = 0) {
    this.budget = budget;
    this.trim = trim;
  }

  at(budget) {
    return budget === this.budget ? this : new BudgetTrim(budget);
  }

  after(usedBits, tokens = 1) {
    return new BudgetTrim(this.budget, clamp(this.trim + (this.budget - usedBits) * Math.min(1, tokens / TOKENS), -MOST_BITS, MOST_BITS));
  }

  request(low, high) {
    return clamp(this.budget + this.trim, low, high);
  }
}
