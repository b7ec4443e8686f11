"""What each engine needs in a bundle: one writer per engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mbq_runtime.bundle.file_names import DECODER_LIBRARY, GPU_FILES, OPS_LIBRARY
from mbq_runtime.bundle.listed_files import FileRange
from mbq_runtime.bundle.tensors import WEIGHTS
from mbq_targets.machines import Target
from mbq_targets.spec import KernelSpec

from ..calibrated import Calibrated
from ..lower import tvm as lower_tvm
from ..lower import tvm_weights
from ..model.checkpoint import Checkpoint
from ..progress import Report, staged
from . import files, parts


@dataclass(frozen=True)
class Work:
    """What a writer is given.

    target: the machine the bundle is for; checkpoint: the model; calibrated: its slices and routers;
    spec: what the kernels are compiled for; folder: the bundle's draft; progress: told how far the work is.
    """

    target: Target
    checkpoint: Checkpoint
    calibrated: Calibrated
    spec: KernelSpec
    folder: Path
    progress: Report


def _write_onnx(work: Work) -> list[FileRange]:
    """The graph, its tensors, and the library of its operators."""
    from ..lower.onnx import lower

    target, folder = work.target, work.folder
    model, tensors, depths = lower(
        work.checkpoint, work.calibrated, target.layout, work.spec.activation_bits,
        kv_bits=work.spec.kv_bits, folder=folder,
    )  # fmt: skip
    places = files.write_model(model, tensors, folder, staged(work.progress, "writing weights"), depths)
    if target.native:
        from mbq_targets.build import build_ops_library

        compiling = staged(work.progress, f"compiling kernels for {target.name}")
        compiling(0, 1)
        (folder / "lib").mkdir()
        build_ops_library(target, work.spec, folder / OPS_LIBRARY)
        compiling(1, 1)
    return parts.ranges(folder / files.EXTERNAL_DATA, places, depths, work.spec.profile.depths)


def _write_tvm(work: Work) -> list[FileRange]:
    """The decoder as a library, and its weights."""
    from mbq_targets.build import build_decoder

    compiling = staged(work.progress, f"compiling the decoder for {work.target.name}")
    compiling(0, 1)
    lowered = lower_tvm.lower(work.checkpoint, work.calibrated, work.spec, folder=work.folder)
    build_decoder(work.target, work.spec, lowered.module, work.folder / DECODER_LIBRARY)
    compiling(1, 1)
    weights = work.folder / WEIGHTS
    tvm_weights.write(lowered.tensors, lowered.entries, weights, staged(work.progress, "writing weights"))
    places = {name: entry.place for name, entry in lowered.entries.items()}
    return parts.ranges(weights, places, lowered.depths, work.spec.profile.depths)


def _write_gpu(work: Work) -> list[FileRange]:
    """The plan of launches, the kernels as text, and the weights."""
    from ..lower.gpu import lower

    lowered = lower(work.checkpoint, work.calibrated, work.target)
    (work.folder / "gpu").mkdir()
    for name, text in lowered.texts.items():
        (work.folder / "gpu" / name).write_text(text, encoding="utf-8")
    plan_file, weights_file = GPU_FILES
    files.write_json(work.folder / plan_file, lowered.plan)
    path = work.folder / weights_file
    files.write_tensors(lowered.tensors, lowered.places, path, staged(work.progress, "writing weights"))
    return parts.ranges(path, lowered.places, lowered.depths, work.spec.profile.depths, weights_file)


WRITERS: dict[str, Callable[[Work], list[FileRange]]] = {
    "onnx": _write_onnx,
    "tvm": _write_tvm,
    "opencl": _write_gpu,
    "webgpu": _write_gpu,
}
"""By engine.  Each returns the ranges of its file of weights, by depth."""
