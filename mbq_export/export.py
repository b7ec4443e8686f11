"""The Python API and the flow of an export: prepare, calibrate, lower, write.

Lifecycle of one export:

1. ``options.Options``: what is asked for.
2. ``prepare.prepare``: the plan.  What would fail later is refused here, before long work.
3. ``calibrate.calibrate``: slices, routers and the quality curve, once for each slice profile that is tried.
4. ``write.bundle.write_bundle``: for each target, the lowered model and its manifest.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .options import Options
from .progress import Report, no_report, staged

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mbq_runtime.bundle.manifest import Manifest
    from mbq_runtime.bundle.slice_profile import SliceProfile

    from .calibrated import Calibrated
    from .methods import Recipe
    from .model.checkpoint import Checkpoint
    from .prepare import Prepared
    from .store import Store

log = logging.getLogger(__name__)

_STEPS = 3
"""Version of the finished steps of a calibration.  It rises when the same inputs give other ones."""
_NOT_THE_MODEL = frozenset({"_name_or_path", "transformers_version", "dtype"})
"""Keys of a config that change no number of a loaded model."""


def export(
    model: str | Path = "smollm2-135m",
    targets: Iterable[str] = ("arm64",),
    *,
    output: str | Path | None = None,
    engine: Literal["onnx", "tvm", "both"] = "onnx",
    slices: str = "3,1,2,2",
    group_size: int | Literal["auto"] = "auto",
    activation_bits: int = 16,
    kv_bits: int | Literal["auto"] = "auto",
    method: Literal["rtn", "quick", "nested", "learned"] = "nested",
    tune_steps: int | None = None,
    router: Literal["auto", "static", "norm", "mlp"] = "auto",
    floor_ratio: float = 1.25,
    calib_data: str | None = None,
    calib_tokens: int | None = None,
    device: str = "auto",
    seed: int = 0,
    force: bool = False,
    sign: str | Path | None = None,
    progress: Report | None = None,
) -> list[Manifest]:
    """Turn a decoder LLM into bundles whose precision follows the device.

    All bundles come from one calibration.  ``mbq-export`` with the same options writes the same bytes.

    >>> from mbq_export import export
    >>> manifests = export("path/to/model", ["rpi5"], output="bundles/mine")              # doctest: +SKIP

    Args:
        model: a Hugging Face folder or id, a GGUF file, or the name of a packaged model.
        targets: machines to export for, as ``mbq-export --list-targets`` names them.
        output: the folder to write.  With several targets: a folder that gets one folder for each.
            None: ``bundles/MODEL-TARGET``.
        engine: what a processor's bundle runs on.
        slices: slice widths in bits, most significant first; their sum is 8.  "auto": calibrate with several widths
            and write the ones that measure better.
        group_size: weights per scale: 32, 64 or 128.  "auto": 64, or 32 where 64 does not divide every layer.
        activation_bits: bits of the integers that processors round activations to: 8 or 16.
        kv_bits: bits of a cached key or value: 32 for float32, or 8.  "auto": 8 where there are kernels for them.
        method: how weights are sliced.
        tune_steps: steps of end-to-end tuning.  None: the method's own number.
        router: the rule that picks each token's depth.  "auto": the one that measures best.
        floor_ratio: the highest acceptable perplexity at the quality floor, over the original model's.
        calib_data: a UTF-8 text file, a ``.jsonl`` file of chats, or ``hf:DATASET[:CONFIG[:SPLIT[:COLUMN]]]``.
            None: Wikipedia and code that come with packages, and chats that the model itself writes.
        calib_tokens: how many tokens of it are used.  None: the method's own number.
        device: where to calibrate, as torch names it.  "auto": a GPU with enough free memory, else the processor.
        seed: seed of all random numbers.
        force: whether existing bundles are replaced.
        sign: file of a private Ed25519 key that signs the bundles.  None: they are not signed.
        progress: called with what is being done, the number of steps that are done, and the number of all steps.

    Returns:
        The manifest of each bundle, in the order of ``targets``.  Of several processes, only the first has any.

    Raises:
        UsageError: an argument is unknown, or does not fit the model, the target or this machine.
        ModelError: the model is missing, broken or of a family that has no lowering.
        BundleError: a bundle cannot be written.  The unfinished bundle is removed; finished steps of the calibration
            are kept for the next run.
        BuildError: a kernel library cannot be compiled.
    """
    options = Options.of(
        model,
        targets,
        output=output,
        engine=engine,
        slices=slices,
        group_size=group_size,
        activation_bits=activation_bits,
        kv_bits=kv_bits,
        method=method,
        tune_steps=tune_steps,
        router=router,
        floor_ratio=floor_ratio,
        calib_data=calib_data,
        calib_tokens=calib_tokens,
        device=device,
        seed=seed,
        force=force,
        sign=None if sign is None else Path(sign),
    )
    from . import processes
    from .prepare import prepare

    with processes.connected():
        return list(run(prepare(options), progress or no_report).values())


def run(prepared: Prepared, progress: Report = no_report) -> dict[Path, Manifest]:
    """Calibrate once, then write every output.

    Args:
        prepared: the export.
        progress: told how far the work is.

    Returns:
        The manifest of each output.  Of several processes, only the first has any.

    Raises:
        MbqError: the export fails, or another export writes one of its folders.  Finished steps of the calibration
            are kept for the next run.
    """
    from .memory import reuse_freed
    from .model.blocks import quick_exact_products
    from .model.causal_attention import in_blocks

    reuse_freed()
    with ExitStack() as names, quick_exact_products(), in_blocks():
        _reserve(prepared, names)
        return _run(prepared, progress)


def _reserve(prepared: Prepared, names: ExitStack) -> None:
    """Keep all folders of an export for it, until ``names`` is closed.  The first of several processes does so."""
    from mbq_runtime.locks import locked

    from . import processes
    from .store import remove_stale
    from .write.files import reserved

    if processes.index():
        return
    for output in prepared.options.outputs:
        names.enter_context(reserved(output, prepared.options.force))
    for profile in prepared.options.profiles:
        folder = _store_folder(prepared, profile)
        names.enter_context(locked(folder, "another export", "an --output in another folder"))
        if processes.count() == 1:
            remove_stale(folder)


def _run(prepared: Prepared, progress: Report) -> dict[Path, Manifest]:
    from . import processes
    from .write.bundle import write_bundle

    started = time.monotonic()
    trials = [_calibrated(prepared, profile, progress) for profile in prepared.options.profiles]
    best = min(trials, key=lambda trial: trial.worth)
    calibration = _facts(prepared, trials, best)
    log.info("calibrated in %.0f s", time.monotonic() - started)
    manifests = {}
    if processes.index() == 0:
        for output in prepared.options.outputs:
            started = time.monotonic()
            manifests[output] = write_bundle(
                prepared, output, best.checkpoint, best.calibrated, calibration=calibration, progress=progress
            )
            log.info("wrote %s in %.0f s", output, time.monotonic() - started)
    for trial in trials:
        trial.store.remove()
    return manifests


@dataclass(frozen=True)
class _Trial:
    """A model calibrated with one slice profile.

    checkpoint: the model; calibrated: its slices and routers; worth: see ``calibrated.worth``; store: its finished
    steps on disk; tokens: tokens of text; held_back_tokens: tokens that routers were chosen on.
    """

    checkpoint: Checkpoint
    calibrated: Calibrated
    worth: tuple[float, float]
    store: Store
    tokens: int
    held_back_tokens: int


def _calibrated(prepared: Prepared, profile: SliceProfile, progress: Report) -> _Trial:
    from . import processes
    from .calibrate import calibrate
    from .calibrated import worth
    from .context import Calibration
    from .data.windows import calibration_windows
    from .methods import CONTEXT_TOKENS, Recipe, held_back_windows
    from .model.loading import load

    options, plan = prepared.options, prepared.plan
    loading = staged(progress, "loading the model")
    loading(0, 1)
    beside = next(iter(options.outputs)).parent
    checkpoint = load(prepared.source, beside if plan.weights_file_bytes else None, prepared.device)
    loading(1, 1)
    count = max(1, plan.calib_tokens // CONTEXT_TOKENS)
    # One process's text: another device may draw other tokens.
    fitted, held_back = processes.from_first(
        calibration_windows(checkpoint, prepared.text, count, held_back_windows(count), CONTEXT_TOKENS, report=progress)
    )
    recipe = Recipe(profile, plan.group_size, options.method, options.tune_steps, options.router, options.seed)
    store = _store(prepared, checkpoint, recipe, fitted)
    if store.finished:
        progress(f"resuming after {store.finished} finished steps", 1, 1)
    if len(options.profiles) > 1:
        progress(f"calibrating with slices {profile}", 1, 1)
    calibrated = calibrate(Calibration(checkpoint, recipe, store, progress), fitted, held_back)
    of_this = worth(calibrated, options.floor_ratio)
    return _Trial(checkpoint, calibrated, of_this, store, int(fitted.size), int(held_back.size))


def _store_folder(prepared: Prepared, profile: SliceProfile) -> Path:
    """Where finished steps of a calibration are kept: beside the first bundle, under a hidden name."""
    first = next(iter(prepared.options.outputs))
    return first.parent / f".{prepared.source.name}.{str(profile).replace(',', '')}.calibration"


def _store(prepared: Prepared, checkpoint: Checkpoint, recipe: Recipe, fitted: NDArray[np.int64]) -> Store:
    """The finished steps of this calibration."""
    from hashlib import sha256

    import numpy as np

    from .methods import METHODS
    from .store import Store

    digest = sha256(repr((_STEPS, recipe, METHODS[recipe.method])).encode() + fitted.tobytes())
    config = {key: value for key, value in checkpoint.model.config.to_dict().items() if key not in _NOT_THE_MODEL}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    # Buffers too: rotations of a GGUF file are in no config.
    for name, values in (*checkpoint.model.named_parameters(), *checkpoint.model.named_buffers()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(values.detach().cpu().numpy()).data)
    return Store(_store_folder(prepared, recipe.profile), digest.hexdigest())


def _facts(prepared: Prepared, trials: list[_Trial], best: _Trial) -> dict[str, Any]:
    """The manifest's entry about the calibration."""
    from . import processes

    facts = {
        "method": prepared.options.method,
        "device": prepared.device,
        "processes": processes.count(),
        "text": prepared.text.name,
        "tokens": best.tokens,
        "held_back_tokens": best.held_back_tokens,
        "routers": best.calibrated.routers,
    }
    if len(trials) > 1:
        facts["slices"] = {
            str(trial.calibrated.profile): dict(zip(("floor_bits", "kl_divergence"), trial.worth, strict=True))
            for trial in trials
        }
    return facts
