"""``mbq bench``"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

from mbq_runtime.errors import UsageError

from .common import bundle_argument, engine_option, listed, progress_line
from .trust import note_code, trust_option

N = TypeVar("N", int, float)


@click.command("bench")
@bundle_argument
@click.option("-p", "--n-prompt", default="512", help="Prompt lengths to read, such as 128,512; 0 for none.")
@click.option("-n", "--n-gen", default="128", help="Tokens to write; 0 for none.")
@click.option("-r", "--repetitions", type=int, default=5, help="Measured runs of each workload, after one to warm up.")
@click.option("--bits", help="Budgets, such as 4,6,8.  [default: the bundle's]")
@click.option("-t", "--threads", help="Processor threads, such as 2,4.  [default: one per big core]")
@click.option("-o", "--output", type=click.Choice(["md", "json", "csv"]), default="md", help="Format of the result.")
@engine_option
@trust_option
def command(
    bundle: Path,
    n_prompt: str,
    n_gen: str,
    repetitions: int,
    bits: str | None,
    threads: str | None,
    output: str,
    engine: str | None,
    trust: bool,
) -> None:
    """Measure how fast BUNDLE reads prompts and writes tokens.

    Options and workloads are those of llama-bench: pp reads a prompt, tg writes tokens, over random tokens.  Speeds are
    mean ± standard deviation.  W, J/token, °C and what slows the board come from its sensors, right after each run.
    They are unknown where the board has no sensor.
    """
    prompts, lengths = _counts("-p", n_prompt, int), _counts("-n", n_gen, int)
    if repetitions < 1:
        raise UsageError(f"-r {repetitions}: needed at least 1")
    if not any(prompts) and not any(lengths):
        raise UsageError("-p 0 -n 0: nothing to measure; give one of them a length")
    from mbq_runtime.bundle import manifest

    budget = manifest.read(bundle).budget
    budgets = [budget.check(b, str(bundle)) for b in _counts("--bits", bits, float)] if bits else [budget.default_bits]

    from mbq_runtime import bench
    from mbq_runtime.engine import Engine
    from mbq_runtime.engine.threads import cores
    from mbq_runtime.sensing.sensors import Sensors

    tests = [bench.Workload(p, 0, b) for b in budgets for p in prompts if p]
    tests += [bench.Workload(0, n, b) for b in budgets for n in lengths if n]
    rows: list[bench.BenchResult] = []
    sensors = Sensors()
    env = bench.environment(sensors.read)
    note_code(bundle, trust=trust)
    for count in _counts("-t", threads, int) if threads else [cores()]:
        loaded = Engine.load(bundle, threads=count, engine=engine)
        with progress_line(f"measuring with {count} threads") as progress:
            for i, test in enumerate(tests):
                progress(i, len(tests))
                rows.append(bench.run(loaded, count, test, repetitions, sensors.read))
    click.echo(bench.FORMATS[output](rows, env))


def _counts(option: str, text: str, number: Callable[[str], N]) -> list[N]:
    values = listed(option, text, number)
    if min(values) < 0:
        raise UsageError(f"{option} {text!r}: needed numbers from 0")
    return values
