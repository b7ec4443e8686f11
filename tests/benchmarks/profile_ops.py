"""Where the time of a bundle's step goes, by op: ONNX Runtime's profile of decode and prefill at every budget.

    python tests/benchmarks/profile_ops.py BUNDLE [--bits 2,4,8] [--tokens 1] [--past 64] [--threads 2] [--runs 40]

Prints a table of microseconds a step and the share of each op; "between ops" is what the session needs besides.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import click
import numpy as np
import onnxruntime as ort

from mbq_runtime.bundle.file_names import OPS_LIBRARY
from mbq_runtime.bundle.layout import whole_blocks
from mbq_runtime.tables import markdown

WARM_RUNS = 5


def open_session(bundle: Path, threads: int, profile: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(profile / "profile")
    if (bundle / OPS_LIBRARY).is_file():
        options.register_custom_ops_library(str(bundle / OPS_LIBRARY))
    return ort.InferenceSession(str(bundle / "model.onnx"), options)


def feed(session: ort.InferenceSession, tokens: int, past: int, bits: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    values: dict[str, np.ndarray] = {
        "input_ids": rng.integers(0, 1000, (1, tokens)).astype(np.int64),
        "attention_mask": np.ones((1, past + tokens), np.int64),
        "position_ids": np.arange(past, past + tokens)[None],
        "avg_bits": np.array([bits, 8], np.float32),
        "scored": np.zeros(1, np.int64),
    }
    inputs = {item.name: item for item in session.get_inputs()}
    for name, item in inputs.items():
        if name.startswith("past") and item.type == "tensor(uint8)":
            values[name] = np.zeros((1, item.shape[1], whole_blocks(past + tokens), item.shape[3]), np.uint8)
        elif name.startswith("past"):
            values[name] = rng.standard_normal((1, item.shape[1], past, item.shape[3])).astype(np.float32)
    return {name: value for name, value in values.items() if name in inputs}


def profile(bundle: Path, threads: int, tokens: int, past: int, bits: float, runs: int) -> dict[str, float]:
    """Median microseconds of a step by op name, with "whole step" and "between ops"."""
    with tempfile.TemporaryDirectory() as scratch:
        session = open_session(bundle, threads, Path(scratch))
        values = feed(session, tokens, past, bits)
        for _ in range(WARM_RUNS + runs):
            session.run(["logits"], values)
        events = json.loads(Path(session.end_profiling()).read_text())
    steps: list[dict[str, float]] = []
    current: dict[str, float] = defaultdict(float)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            current[event["args"]["op_name"]] += event["dur"]
        elif event.get("name") == "model_run":
            current["between ops"] = event["dur"] - sum(current.values())
            current["whole step"] = event["dur"]
            steps.append(current)
            current = defaultdict(float)
    kept = steps[WARM_RUNS:]
    return {op: statistics.median(step[op] for step in kept) for op in kept[0]}


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--bits", default="2,4,8")
@click.option("--tokens", default=1)
@click.option("--past", default=64)
@click.option("--threads", default=2)
@click.option("--runs", default=40)
def main(bundle: Path, bits: str, tokens: int, past: int, threads: int, runs: int) -> None:
    """See the module's docstring."""
    columns = {b: profile(bundle, threads, tokens, past, float(b), runs) for b in bits.split(",")}
    last = next(reversed(columns.values()))
    print(f"{tokens} tokens behind {past}, {threads} threads, median of {runs}\n")
    headings = ["op", *(heading for b in columns for heading in (f"{b} bits: us", "%"))]
    rows = [
        [op, *(cell for c in columns.values() for cell in (f"{c[op]:.0f}", f"{100 * c[op] / c['whole step']:.1f}"))]
        for op in sorted(last, key=last.__getitem__, reverse=True)
    ]
    print(markdown(headings, rows, words=["op"]))


if __name__ == "__main__":
    main()
