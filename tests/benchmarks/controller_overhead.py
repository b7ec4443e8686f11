"""Decoding speed with the controller and the sensors on, against off: same engine, same run, taking turns.

The budget is held at 8 bits on both sides (the policy's bands count, but its floor is the ceiling), so that all that
differs is the looking and deciding.  Prints the machine, the ratio of the median speeds with a bootstrap interval,
the processor time of the controller's and the sensors' threads, and raw JSON on request.

    python tests/benchmarks/controller_overhead.py bundles/smollm2-135m-host [--rounds 30] [--tokens 512] [--json FILE]
"""

from __future__ import annotations

import json
import os
import random
import statistics
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from measured_on import measured_on

from mbq_runtime import Engine
from mbq_runtime.control.controller import start, step
from mbq_runtime.control.governor import PERIOD_S, Governor
from mbq_runtime.control.policy import POLICIES
from mbq_runtime.sensing import Sensors

PROMPT = "Tell me a long story about the sea."
NEEDED = 0.995
POLICY = replace(POLICIES["auto"], floor_bits=8.0, ceiling_bits=8.0)


def speed(engine: Engine, tokens: int, controlled: bool) -> float:
    """Pieces of text a second of one reply, prompt left out."""
    with Governor(engine, Sensors(), POLICY) if controlled else nullcontext():
        reply = iter(engine.generate(PROMPT, max_tokens=tokens, avg_bits=8.0))
        next(reply)
        begin_s = time.perf_counter()  # looks between tokens count, as they do for whoever reads
        pieces = sum(1 for _ in reply)
        return pieces / (time.perf_counter() - begin_s)


def look_s(engine: Engine, looks: int = 200) -> float:
    """Processor seconds of one look at the sensors and one step."""
    sensors, policy = Sensors(), POLICY.within(engine.manifest)
    state = start(policy)
    sensors.read()
    begin_s = time.process_time()
    for _ in range(looks):
        state = step(state, sensors.read(), time.monotonic(), policy).state
    return (time.process_time() - begin_s) / looks


def interval(off: list[float], on: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median of on/off over pairs of neighbours."""
    ratios, chance = [b / a for a, b in zip(off, on, strict=True)], random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[50], medians[-51]


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--rounds", type=int, default=30)
@click.option("--tokens", type=int, default=512)
@click.option("--threads", type=int)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(bundle: Path, rounds: int, tokens: int, threads: int | None, json_path: Path | None) -> None:
    engine = Engine.load(bundle, threads=threads)
    speed(engine, tokens, True)
    off: list[float] = []
    on: list[float] = []
    for i in range(rounds):
        # Which side goes first alternates too.
        for controlled in (False, True) if i % 2 == 0 else (True, False):
            (on if controlled else off).append(speed(engine, tokens, controlled))
    ratio = statistics.median(b / a for a, b in zip(off, on, strict=True))
    low, high = interval(off, on)
    one_s = look_s(engine)
    result: dict[str, Any] = {
        "environment": measured_on(
            threads=threads or os.cpu_count(), model=engine.manifest.model.name, target=engine.manifest.target.name
        ),
        "ratio": ratio, "interval": [low, high], "look_cpu_s": one_s, "core_share": one_s / PERIOD_S,
        "off_tokens_per_s": off, "on_tokens_per_s": on,
    }  # fmt: skip
    click.echo(json.dumps(result["environment"]))
    click.echo(f"off {statistics.median(off):.1f} tokens/s, on {statistics.median(on):.1f} tokens/s")
    click.echo(f"ratio {ratio:.4f} (95 %: {low:.4f} to {high:.4f}), needed {NEEDED}")
    click.echo(f"one look {1e3 * one_s:.2f} ms of processor time: {one_s / PERIOD_S:.2%} of a core")
    if json_path is not None:
        json_path.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
