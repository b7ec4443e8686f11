"""Slicing a matrix with the compiled loops over columns, and with torch's operations: same weights, taking turns.

Prints the machine, the median times, and the ratio within a round.

    python tests/benchmarks/slicing_columns.py [--shape 960x576] [--rounds 5] [--sweeps 3]
"""

from __future__ import annotations

import json
import statistics
import time
from unittest.mock import patch

import click
import torch
from measured_on import measured_on

from mbq_export.format.codes import F32
from mbq_export.slicing import columns, nested
from mbq_export.slicing.refine import refine
from mbq_runtime.bundle.slice_profile import SliceProfile

GROUP_SIZE = 64


def seconds(weight: F32, hessian: torch.Tensor, profile: SliceProfile, sweeps: int, compiled: bool) -> float:
    """Of one slicing: error feedback and refinement."""
    with patch.object(columns, "_compiled", columns._compiled if compiled else lambda device: None):
        begin_s = time.perf_counter()
        sliced = nested.slice_weight(weight, hessian, GROUP_SIZE, profile, "weight")
        refine(weight, hessian, sliced, profile, sweeps)
        return time.perf_counter() - begin_s


@click.command()
@click.option("--shape", default="960x576", help="N x K of the matrix.")
@click.option("--slices", default="3,1,2,2")
@click.option("--rounds", default=5)
@click.option("--sweeps", default=3)
def main(shape: str, slices: str, rounds: int, sweeps: int) -> None:
    n, k = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * k, k, generator=generator) @ torch.randn(k, k, generator=generator)
    weight, hessian = torch.randn(n, k, generator=generator).numpy(), (inputs.T @ inputs).double() / len(inputs)
    of_run = {"torch": torch.__version__, "shape": shape, "slices": slices, "sweeps": sweeps}
    click.echo(json.dumps(measured_on(threads=torch.get_num_threads(), **of_run)))
    profile = SliceProfile.parse(slices)
    seconds(weight, hessian, profile, 0, compiled=True)  # compiled now, if not before
    found: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(rounds):
        for compiled, of_side in found.items():
            of_side.append(seconds(weight, hessian, profile, sweeps, compiled))
    ratios = [torch_s / compiled_s for compiled_s, torch_s in zip(found[True], found[False], strict=True)]
    click.echo(f"compiled {statistics.median(found[True]):.3f} s, torch {statistics.median(found[False]):.3f} s")
    click.echo(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
