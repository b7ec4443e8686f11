"""What routers and the choice of depths take of a step's time, by engine.

    python tests/benchmarks/router_cost.py BUNDLE [--engine onnx] [--bits 4] [--threads 2] [--rounds 60] [--tokens 16]

At the highest budget no router runs, every token has all bits; a thousandth of a bit below it all of them do, and
tokens still have all bits but for one in thousands.  Both, and the budget whose share is wanted, take turns; the
difference is over that budget's step.  Interval: bootstrap over rounds, 95 %.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path

from measured_on import measured_on

from mbq_runtime import Engine

PROMPT_TOKENS = 16
BELOW_BITS = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engine")
    parser.add_argument("--bits", type=float, default=4.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=16)
    options = parser.parse_args()
    engine = Engine.load(options.bundle, engine=options.engine, threads=options.threads)
    highest = engine.manifest.budget.max_bits
    budgets = {"without": highest, "with": highest - BELOW_BITS, "wanted": options.bits}
    step_us: dict[str, list[float]] = {name: [] for name in budgets}
    for round_ in range(options.rounds + 2):
        # Which comes first changes, so that none is always behind the same.
        for name in sorted(budgets, key=lambda name: (list(budgets).index(name) + round_) % len(budgets)):
            passes = engine.time_passes([PROMPT_TOKENS, *[1] * options.tokens], budgets[name]).seconds[1:]
            if round_ >= 2:  # the first two warm up
                step_us[name].append(1e6 * statistics.median(passes))

    def share(rounds: list[int]) -> float:
        without, routed, wanted = (statistics.median(step_us[name][i] for i in rounds) for name in budgets)
        return (routed - without) / wanted

    chance, rounds = random.Random(0), list(range(options.rounds))
    resampled = sorted(share(chance.choices(rounds, k=len(rounds))) for _ in range(2000))
    print(json.dumps(measured_on()))
    for name, bits in budgets.items():
        print(f"{name:8} {bits:6.3f} bits  {statistics.median(step_us[name]):8.1f} us a token")
    low, high = resampled[50], resampled[-51]
    print(f"routers: {share(rounds):.1%} of a step at {options.bits:g} bits (95 %: {low:.1%} to {high:.1%})")
    facts = engine.manifest
    weight_bytes = facts.weights.bytes_per_token[f"{options.bits:g}"]
    print(f"their bytes: {facts.router.bytes / weight_bytes:.1%} of the {weight_bytes / 1e6:.1f} MB read")


if __name__ == "__main__":
    main()
