"""A bundle beside llama.cpp's files and onnxruntime-genai's models of the same weights: decode, prefill, bandwidth.

Sides called a8 are bundles with activations of 8 bits.  Every side runs in a process of its own; they take turns within
one run, and each turn begins with passes that are not counted.  Prints the machine, a table of medians with quartiles,
the ratios and raw JSON on request:

    python tests/benchmarks/versus.py [--model llama-1b] [--slices 2,2,2,2] [--threads 2] [--json FILE]

On a machine that is busy otherwise, ``--threads 1 --clock cpu`` compares processor time.  The first run makes the
files (see ``versus_models.py``): 12 GB of disk and memory for the 1B model.  The export extra must be installed;
llama-cpp-python, built for this machine, and onnx-ir (for onnxruntime-genai's builder) add their sides when they are.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import click
from measured_on import measured_on
from versus_models import CHECKPOINTS, OURS, Side, default_work_folder, library_versions, sides
from versus_worker import PROBE_BYTES

from mbq_runtime.bundle.manifest import read as read_manifest
from mbq_runtime.tables import markdown
from mbq_targets.machines import resolve

WARM_TOKENS = 3
PAUSE_S = 0.1  # the threads of the side before spin for a while
TESTS = {"tg": 1, "pp128": 128, "pp512": 512, "pp2048": 2048}
"""Tokens in a counted pass."""

# (this project's bits, other sides, the ratio aimed at) of decoding.
GOALS: tuple[tuple[float, tuple[str, ...], dict[str, float]], ...] = (
    (2, ("llama.cpp Q2_K",), {"llama-1b": 1.8, "smollm2-135m": 1.8}),
    (3, ("llama.cpp Q3_K_M",), {"llama-1b": 1.8}),
    (4, ("llama.cpp Q4_0", "llama.cpp Q4_K_M"), {"llama-1b": 1.3, "smollm2-135m": 1.3}),
    (4, ("genai int4",), {"llama-1b": 1.3, "smollm2-135m": 1.3}),
    (8, ("llama.cpp Q8_0",), {"llama-1b": 1.25, "smollm2-135m": 1.25}),
)
PREFILL_GOAL = 1.3


class Worker:
    """A side's process; see ``versus_worker.py``."""

    def __init__(self, side: Side, threads: int, context: int, clock: str) -> None:
        script = Path(__file__).with_name("versus_worker.py")
        command = [sys.executable, str(script), side.engine, str(side.path), str(threads), str(context), clock]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.first_token_s: float = self._answer()["first_token_s"]

    def passes(self, sizes: Sequence[int], bits: float) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"sizes": list(sizes), "bits": bits}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a side ended: {self.process.args!r}")
        return dict(json.loads(line))


@contextmanager
def worker(side: Side, threads: int, context: int, clock: str) -> Iterator[Worker]:
    started = Worker(side, threads, context, clock)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait()


@dataclass
class Line:
    """One row of the table.  seconds: of every counted pass, by test; read_bytes: of weights for a decoded token."""

    name: str
    worker: Worker
    size_bytes: int
    bits: float = 0.0
    read_bytes: int | None = None
    bits_used: float | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def turn(self, test: str, tokens: int) -> None:
        size = TESTS[test]
        warm, counted = ([1] * WARM_TOKENS, [1] * tokens) if size == 1 else ([1], [size])
        answer = self.worker.passes([*warm, *counted], self.bits)
        self.bits_used = answer.get("bits_used", self.bits_used)
        self.seconds.setdefault(test, []).extend(answer["seconds"][len(warm) :])

    def speed(self, test: str) -> float:
        """Tokens/s, median."""
        return TESTS[test] / statistics.median(self.seconds[test])


def start(found: Sequence[Side], threads: int, clock: str, context: int, stack: ExitStack) -> list[Line]:
    lines = []
    for side in found:
        running = stack.enter_context(worker(side, threads, context, clock))
        if not side.bits:
            lines.append(Line(side.name, running, side.size_bytes))
            continue
        table = read_manifest(side.path).weights.bytes_per_token
        for bits in side.bits:
            lines.append(Line(f"{side.name} {bits:g} bits", running, side.size_bytes, bits, table.get(f"{bits:g}")))
    return lines


def run(lines: Sequence[Line], probe: Worker, tests: Sequence[str], rounds: int, tokens: int) -> list[float]:
    """Everybody's turns; returns the probe's bytes/s."""
    bandwidth = []
    for _ in range(rounds):
        bandwidth += [PROBE_BYTES / s for s in probe.passes([1, 1, 1], 0)["seconds"][1:]]
        for test in tests:
            for line in lines:
                time.sleep(PAUSE_S)
                line.turn(test, tokens)
    return bandwidth


def _quartiles(line: Line, test: str) -> str:
    speeds = [TESTS[test] / s for s in line.seconds[test]]
    low, middle, high = statistics.quantiles(speeds, n=4) if len(speeds) > 1 else speeds * 3
    return f"{middle:.1f} ({low:.1f}-{high:.1f})"


def table(lines: Sequence[Line], tests: Sequence[str], ceiling: float) -> str:
    speeds = [f"{test} tokens/s" for test in tests]
    headings = ["side", "MB", *speeds, "weights GB/s", "of the ceiling", "first token s"]
    rows: list[list[str]] = []
    for line in lines:
        rate = line.read_bytes * line.speed("tg") if line.read_bytes and "tg" in tests else None
        rows.append(
            [
                line.name,
                f"{line.size_bytes / 1e6:.0f}",
                *(_quartiles(line, test) for test in tests),
                f"{rate / 1e9:.1f}" if rate else "",
                f"{rate / ceiling:.0%}" if rate else "",
                f"{line.worker.first_token_s:.2f}",
            ]
        )
    return markdown(headings, rows, words=["side"])


def ratios(model: str, lines: Sequence[Line], tests: Sequence[str]) -> Iterator[str]:
    by_name = {line.name: line for line in lines}
    for bits, rivals, goals in GOALS if "tg" in tests else ():
        ours = [by_name[name] for engine in OURS if (name := f"{engine} {bits:g} bits") in by_name]
        present = [by_name[r] for r in rivals if r in by_name]
        for line in ours if present and model in goals else ():
            best = max(present, key=lambda rival: rival.speed("tg"))
            yield f"decode, {line.name}: {line.speed('tg') / best.speed('tg'):.2f} x {best.name}, goal {goals[model]}"
    for test, engine in product(tests, OURS):
        others = [line for line in lines if line.name.startswith("llama.cpp")]
        ours = [line for line in lines if line.bits and line.name.startswith(f"{engine} {line.bits:g}")]
        if TESTS[test] > 1 and others and ours:
            best = max(others, key=lambda line: line.speed(test))
            worst = min(ours, key=lambda line: line.speed(test))
            ratio = worst.speed(test) / best.speed(test)
            yield f"{test}: {worst.name}, the slowest, {ratio:.2f} x {best.name}, goal {PREFILL_GOAL}"


@click.command()
@click.option("--model", type=click.Choice(list(CHECKPOINTS)), default="smollm2-135m")
@click.option("--slices", default="2,2,2,2")
@click.option("--bits", default="2,2.5,3,4,6,8")
@click.option("--threads", default=2)
@click.option("--clock", type=click.Choice(["wall", "cpu"]), default="wall", help="cpu: on a busy machine, 1 thread.")
@click.option("--rounds", default=5)
@click.option("--tokens", default=24, help="Decoded in each turn.")
@click.option("--tests", default="tg,pp128,pp512", help="Of " + ", ".join(TESTS) + ".")
@click.option("--target", default="host", help="Of this project's sides; x86-64-v3 beside a llama.cpp of AVX2.")
@click.option("--only", default="", help="Regular expression for the names of sides; all by default.")
@click.option("--work", type=click.Path(path_type=Path), default=default_work_folder())
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(
    model: str,
    slices: str,
    bits: str,
    threads: int,
    clock: str,
    rounds: int,
    tokens: int,
    tests: str,
    target: str,
    only: str,
    work: Path,
    json_file: Path | None,
) -> None:
    """See the module's docstring."""
    if clock == "cpu" and threads != 1:
        raise click.UsageError("--clock cpu counts the time of one thread: use --threads 1")
    budgets, wanted = tuple(map(float, bits.split(","))), tests.split(",")
    found = [side for side in sides(work, model, slices, budgets, resolve(target)) if re.search(only, side.name)]
    facts = measured_on(threads=threads, clock=clock, target=resolve(target).name, **library_versions())
    with ExitStack() as stack:
        probe = stack.enter_context(worker(Side("probe", "probe", work), threads, 0, clock))
        context = WARM_TOKENS + max(tokens, *(TESTS[test] for test in wanted))
        lines = start(found, threads, clock, context, stack)
        bandwidth = run(lines, probe, wanted, rounds, tokens)
    ceiling = statistics.median(bandwidth)
    print(f"{model}: " + " ".join(f"{key}={value}" for key, value in facts.items()))
    print(f"memory read, {threads} threads: {ceiling / 1e9:.1f} GB/s\n")
    print(table(lines, wanted, ceiling), *ratios(model, lines, wanted), sep="\n")
    if json_file is not None:
        kept = ("name", "size_bytes", "bits_used", "read_bytes", "seconds")
        raw = [{key: getattr(line, key) for key in kept} for line in lines]
        document = {"model": model, "environment": facts, "bandwidth_bytes_per_s": bandwidth, "sides": raw}
        json_file.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
