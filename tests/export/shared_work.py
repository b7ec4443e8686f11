"""The shared work of a calibration, done by one process or, with ``torchrun``, by several: arrays to compare.

A script: MODEL OUTPUT.npz, which the first process writes.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from mbq_export import processes, quality
from mbq_export.context import Calibration
from mbq_export.format.codes import Sliced, decode
from mbq_export.methods import METHODS, TUNE_BASE_SLICE, TUNE_GAINS, TUNE_ROUTED, TUNE_SCALES, Phase, Recipe
from mbq_export.model.checkpoint import Checkpoint
from mbq_export.model.loading import load
from mbq_export.model.router_inputs import Routing
from mbq_export.model.source import locate
from mbq_export.routing import select
from mbq_export.routing.slice_gains import measure_gains
from mbq_export.slicing import rtn
from mbq_export.slicing.by_block import slice_model
from mbq_export.transforms.smoothing import smooth
from mbq_export.tuning.teacher import Teacher
from mbq_export.tuning.tune import tune
from mbq_runtime.bundle.slice_profile import SliceProfile

PROFILE = SliceProfile((3, 1, 2, 2))
GROUP_SIZE = 32


def work(checkpoint: Checkpoint) -> dict[str, NDArray[np.generic]]:
    rng = np.random.default_rng(0)
    # Seven windows: the shares differ in size, and some depths occur in one process only.
    windows = rng.integers(0, checkpoint.decoder.vocab_size, (7, 32))
    METHODS["nested"] = replace(METHODS["nested"], sweeps=1)
    calibration = Calibration(checkpoint, Recipe(PROFILE, GROUP_SIZE))
    original = Teacher(calibration, windows, exact=True)
    found = {"reference": quality.reference(original), "head_scale": smooth(checkpoint, windows)}
    # Two windows, so a step takes the same ones with any number of processes.
    teacher = Teacher(calibration, windows[:2])
    importance = {
        name: rng.uniform(0.5, 1.5, windows.shape).astype(np.float32)
        for unit in checkpoint.decoder.units()
        for name in unit.sources
    }
    # From here on the slices are rounded ones.  They contain no sums, so they are the same with any process count.
    slices = {unit.name: rtn.slice_unit(checkpoint, unit, GROUP_SIZE, PROFILE) for unit in checkpoint.decoder.units()}
    fed_back = slice_model(calibration, windows, importance, keep_weights=True)
    found |= weights("sliced", fed_back)
    by_energy = dict.fromkeys(slices, halves)
    routings: dict[Phase, Routing | None] = {
        TUNE_GAINS: None,
        TUNE_SCALES: None,
        TUNE_BASE_SLICE: None,
        TUNE_ROUTED: lambda avg_bits: by_energy,
    }
    for phase, routing in routings.items():
        slices = tune(
            calibration, teacher, slices, replace(phase, windows_per_step=2), 4,
            seed=0, routing=routing,
        )  # fmt: skip
        found |= weights(phase.name, slices)
    stats = measure_gains(calibration, slices, windows, keep_inputs=True)
    for name, of_unit in stats.items():
        assert of_unit.inputs is not None
        found |= {f"energy {name}": of_unit.mean_square, f"change {name}": of_unit.change, f"in {name}": of_unit.inputs}
        # Each process draws its own labels, so losses differ.  Replace them by values that do not depend on labels.
        of_unit.loss = np.pad(of_unit.change[:, ::-1].cumsum(1)[:, ::-1], ((0, 0), (0, 1)))
    routers = select.fit_routers(calibration, "norm", stats)
    found |= {f"router {name}": np.append(router.bias, router.norm_gain) for name, router in routers.items()}
    (measured,) = quality.measure(calibration, slices, original, [by_energy])
    return found | {"nll": measured.nll, "bits": np.array([measured.avg_bits_used])}


def halves(x: torch.Tensor) -> torch.Tensor:
    """Depth 1 or 4, by the sign of the first channel."""
    return 1 + 3 * (x[:, 0] > 0).long()


def weights(stage: str, slices: dict[str, Sliced]) -> dict[str, NDArray[np.generic]]:
    return {f"{stage} {name}": decode(sliced, PROFILE, PROFILE.depths) for name, sliced in slices.items()}


def main(model: str, output: str) -> None:
    with processes.connected():
        found = work(load(locate(model)))
        if processes.index() == 0:
            np.savez(output, processes=np.array([processes.count()]), **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
