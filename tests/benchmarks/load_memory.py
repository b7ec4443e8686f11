"""What a fresh process needs until it speaks, at every budget: seconds to the first token, peak resident memory.

    python tests/benchmarks/load_memory.py BUNDLE [--engine onnx] [--bits 2,4,8] [--runs 5]

Each run is a process of its own that loads the bundle, reads a prompt of 16 tokens and makes 16 more; the first, which
may have to fetch the file from disk, is not counted.  Seconds count from the first import of this package on.  Peak
memory is what the system counts: mapped weights as far as they were read.  (tvm_ffi imports torch where there is
one, which no board has.)
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT_TOKENS, NEW_TOKENS = 16, 16


def once(bundle: Path, engine: str, bits: float) -> None:
    """One run, in this process: prints seconds and bytes as JSON."""
    begin_s = time.perf_counter()
    from mbq_runtime import Engine

    passes = Engine.load(bundle, engine=engine).time_passes([PROMPT_TOKENS, *[1] * NEW_TOKENS], bits).seconds
    first_s = time.perf_counter() - sum(passes[1:]) - begin_s
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"first_token_s": first_s, "peak_bytes": peak_bytes}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engine", default="onnx")
    parser.add_argument("--bits", default="2,4,8")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--once", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once is not None:
        once(options.bundle, options.engine, options.once)
        return
    from measured_on import measured_on

    print(json.dumps(measured_on()))
    print(f"{options.bundle.name} on {options.engine}, median of {options.runs} processes each")
    print("| bits | first token s | peak resident MB |")
    print("| ---: | ---: | ---: |")
    for bits in options.bits.split(","):
        command = [sys.executable, __file__, str(options.bundle), "--engine", options.engine, "--once", bits]
        runs = [json.loads(subprocess.check_output(command)) for _ in range(options.runs + 1)][1:]
        first_s, peak = (statistics.median(run[key] for run in runs) for key in runs[0])
        print(f"| {bits} | {first_s:.2f} | {peak / 1e6:.0f} |")


if __name__ == "__main__":
    main()
