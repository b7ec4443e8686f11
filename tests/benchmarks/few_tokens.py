"""Time of a pass over few tokens, over that of a pass over one, for each engine and budget.

    python tests/benchmarks/few_tokens.py BUNDLE [BUNDLE2] --bits 4,8 --threads 1 --rounds 15 [--json FILE]

BUNDLE is a folder, or a shape such as llama-1b.  It has both engines, or BUNDLE has one and BUNDLE2 the other.  Each
pass adds its tokens behind ``--past`` tokens and gives logits for all of them, as the check of guesses does.  Sizes,
budgets and engines take turns in each round.  Figures are the least of all rounds, because other work on the machine
only adds time.  FILE has the medians too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import product
from pathlib import Path

import numpy as np
from measured_on import measured_on
from named_bundles import bundle_of

from mbq_runtime import Engine
from mbq_runtime.bundle.manifest import read

SIZES = (1, 2, 3, 4, 6, 8, 16, 32)


def time_round(engine: Engine, bits: float, past: int) -> list[float]:
    """Seconds of one pass of each size."""
    context = engine._backend.start(past + max(SIZES), np.array([bits, len(engine.manifest.slices)], np.float32))
    rng, vocabulary = np.random.default_rng(0), engine.manifest.model.vocab_size
    context.append(rng.integers(0, vocabulary, past, np.int32))
    found = []
    for size in SIZES:
        tokens = rng.integers(0, vocabulary, size, np.int32)
        start_s = time.perf_counter()
        context.append(tokens, size)
        context.logits()
        found.append(time.perf_counter() - start_s)
        context.rewind(past)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=bundle_of)
    parser.add_argument("--engines", help="Some of those that the bundles have, such as onnx,tvm.")
    parser.add_argument("--bits", default="4,8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--past", type=int, default=64)
    parser.add_argument("--json", type=Path, help="Write the seconds of all passes here.")
    options = parser.parse_args()
    paths = {engine: path for path in reversed(options.bundles) for engine in read(path).engines}
    engines = {
        name: Engine.load(paths[name], engine=name, threads=options.threads, context=options.past + max(SIZES))
        for name in (options.engines.split(",") if options.engines else paths)
    }
    rows = list(product(engines, map(float, options.bits.split(","))))
    seconds: dict[tuple[str, float], list[list[float]]] = {row: [] for row in rows}
    for round_ in range(options.rounds + 1):
        for name, bits in rows:
            found = time_round(engines[name], bits, options.past)
            if round_:  # the first warms up
                seconds[name, bits].append(found)
    where = measured_on(threads=options.threads, past=options.past, rounds=options.rounds)
    print(json.dumps(where))
    print("| engine | bits | 1 token | " + " | ".join(map(str, SIZES[1:])) + " |")
    print("| --- | ---: | ---: | " + "---: | " * (len(SIZES) - 1))
    for (name, bits), of_row in seconds.items():
        one, *more = (min(column) for column in zip(*of_row, strict=True))
        print(f"| {name} | {bits:g} | {1e3 * one:.2f} ms | " + " | ".join(f"{s / one:.2f}" for s in more) + " |")
    if options.json is not None:
        passes = [
            {"engine": name, "bits": bits, "tokens": size, "least_s": min(times), "median_s": statistics.median(times)}
            for (name, bits), of_row in seconds.items()
            for size, times in zip(SIZES, zip(*of_row, strict=True), strict=True)
        ]
        options.json.write_text(json.dumps({**where, "passes": passes}, indent=1) + "\n")


if __name__ == "__main__":
    main()
