"""Decode speed of the TVM engine beside the ONNX engine, in turns, in one run.

    python tests/benchmarks/engines.py BUNDLE [BUNDLE2] --bits 3,4,8 --threads 2 --rounds 20 --tokens 32

BUNDLE has both engines, or BUNDLE has one and BUNDLE2 the other.  Each round decodes ``--tokens`` tokens behind a
prompt of 16 with each engine and at each budget; figures are medians over rounds, with quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from measured_on import measured_on

from mbq_runtime import Engine
from mbq_runtime.bundle.manifest import read

PROMPT_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--bits", default="3,4,8")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    paths = {engine: path for path in reversed(options.bundles) for engine in read(path).engines}
    engines = {name: Engine.load(paths[name], engine=name, threads=options.threads) for name in ("onnx", "tvm")}
    budgets = [float(bits) for bits in options.bits.split(",")]
    speeds: dict[tuple[str, float], list[float]] = {(name, bits): [] for bits in budgets for name in engines}
    for round_ in range(options.rounds + 1):
        for (name, bits), found in speeds.items():
            passes = engines[name].time_passes([PROMPT_TOKENS, *[1] * options.tokens], bits).seconds[1:]
            if round_:  # the first warms up
                found.append(options.tokens / sum(passes))
    print(json.dumps(measured_on()))
    print(f"{options.threads or 'all'} threads, {options.rounds} rounds of {options.tokens} tokens, in turns")
    print("| bits | engine | tokens/s, median (quartiles) | over ONNX |")
    print("| ---: | --- | ---: | ---: |")
    for (name, bits), found in speeds.items():
        low, middle, high = statistics.quantiles(found, n=4)
        ratio = middle / statistics.median(speeds["onnx", bits])
        print(f"| {bits:g} | {name} | {middle:.1f} ({low:.1f}-{high:.1f}) | {ratio:.2f} |")


if __name__ == "__main__":
    main()
