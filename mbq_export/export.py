"""The whole road on the workstation: locate, plan, calibrate, lower, compile, write."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle import manifest as bundle_manifest
from mbq_runtime.bundle.slice_profile import CODE_BITS, SliceProfile
from mbq_runtime.bundle.tensors import WEIGHTS
from mbq_runtime.errors import UsageError
from mbq_targets.machines import Target
from mbq_targets.spec import KernelSpec

from . import devices, processes
from . import plan as planning
from .data import windows
from .lower import tvm as lower_tvm
from .lower import tvm_weights
from .methods import CONTEXT_TOKENS, METHODS, Recipe, held_back_windows, tunings
from .model.checkpoint import Checkpoint, Source, load, locate, read_config
from .progress import Report, no_report
from .store import Store

if TYPE_CHECKING:
    from .calibrate import Calibrated

log = logging.getLogger(__name__)

TOOLS = ("mbq-export", "torch", "transformers", "onnx", "apache-tvm", "ziglang", "numpy")


@dataclass(frozen=True)
class Options:
    """What the command line asks for.  outputs: a folder for each target, all written from one calibration;
    engines: names of ``WRITERS``, what each bundle is to run on, the first unless it is told another;
    profiles: what weights are sliced by; of several, each is calibrated and what measures better is written;
    method, router: as ``Recipe`` takes them; tune_steps, calib_tokens: None for the method's own; floor_ratio: how many
    times the original's perplexity is still acceptable; calib_data: as ``calibration_data.open_source``
    takes it; activation_bits: of the integers that processors round activations to; device: to calibrate on, as
    ``devices.choose`` takes it."""

    model: str
    outputs: dict[Path, Target]
    engines: tuple[str, ...]
    profiles: tuple[SliceProfile, ...]
    group_size: str
    activation_bits: int
    method: str
    tune_steps: int | None
    router: str
    floor_ratio: float
    calib_data: str | None
    calib_tokens: int | None
    device: str
    seed: int
    force: bool


@dataclass(frozen=True)
class Prepared:
    """A checked export: what will be done, and nothing done yet.  plans: one for each output, with the first of the
    profiles while several are to be tried."""

    options: Options
    source: Source
    calibration_source: windows.Source
    plans: dict[Path, planning.Plan]
    device: str

    @property
    def plan(self) -> planning.Plan:
        """The first output's; what does not hang on the target is the same in all."""
        return next(iter(self.plans.values()))


def prepare(options: Options) -> Prepared:
    """Work out the plan and refuse what would fail later.  Raises UsageError or ModelError."""
    calib_tokens = _calib_tokens(options)
    if calib_tokens < 1:
        default = METHODS[options.method].calib_tokens
        raise UsageError(f"--calib-tokens {calib_tokens}: at least 1 is needed; {default} is the default")
    if not options.floor_ratio >= 1:
        raise UsageError(f"--floor-ratio {options.floor_ratio:g}: 1 or more is needed; 1.25 is the default")
    if options.tune_steps and not METHODS[options.method].tuning_steps:
        raise UsageError(f"--tune-steps {options.tune_steps}: the method {options.method} tunes nothing; leave it out")
    source = locate(options.model)
    decoder = read_config(source)
    group_size = planning.choose_group_size(decoder, options.group_size)
    phases = {phase for slices in options.profiles for phase in tunings(options.method, slices, options.tune_steps)}
    plans = {
        output: planning.Plan(
            decoder, options.profiles[0], group_size, target.layout, options.router, calib_tokens, phases,
            in_memory=True,
        )
        for output, target in options.outputs.items()
    }  # fmt: skip
    device = devices.choose(options.device, next(iter(plans.values())).peak_memory_bytes)
    if device == devices.CPU and source.gguf is None:
        plans = {output: replace(plan, in_memory=False) for output, plan in plans.items()}
    found = planning.problems(plans, options, device)
    if found:
        raise UsageError("; ".join(found))
    return Prepared(options, source, windows.open_source(options.calib_data), plans, device)


def run(prepared: Prepared, progress: Report = no_report) -> dict[Path, bundle_manifest.Manifest]:
    """Do it, and return the manifest of each output, of several processes in the first only.

    Raises an MbqError; an unfinished bundle leaves nothing.
    """
    options, started = prepared.options, time.monotonic()
    tried = [_calibrated(prepared, profile, progress) for profile in options.profiles]
    best = min(tried, key=lambda trial: trial.worth)
    calibrated = best.calibrated
    calibration = {
        "method": options.method,
        "device": prepared.device,
        "processes": processes.count(),
        "text": prepared.calibration_source.name,
        "tokens": best.tokens,
        "held_back_tokens": best.held_back_tokens,
        "routers": calibrated.routers,
    }
    if len(tried) > 1:
        calibration["slices"] = {
            str(trial.calibrated.profile): dict(zip(("floor_bits", "perplexity"), trial.worth, strict=True))
            for trial in tried
        }
    log.info("calibrated in %.0f s", time.monotonic() - started)
    chosen = {output: replace(plan, profile=calibrated.profile) for output, plan in prepared.plans.items()}
    prepared = replace(prepared, plans=chosen)
    manifests = {
        output: write_calibrated(prepared, output, best.checkpoint, calibrated, calibration, progress)
        for output in options.outputs
        if processes.index() == 0
    }
    for trial in tried:
        trial.store.remove()
    return manifests


@dataclass(frozen=True)
class _Trial:
    """A model calibrated with one profile.  worth: see ``calibrate.worth``; store: what it keeps on disk."""

    checkpoint: Checkpoint
    calibrated: Calibrated
    worth: tuple[float, float]
    store: Store
    tokens: int
    held_back_tokens: int


def _calibrated(prepared: Prepared, profile: SliceProfile, progress: Report) -> _Trial:
    from .calibrate import calibrate, worth

    options, plan = prepared.options, prepared.plan
    progress("loading the model", 0, 1)
    beside = next(iter(options.outputs)).parent
    checkpoint = load(prepared.source, beside if plan.weights_file_bytes else None, prepared.device)
    progress("loading the model", 1, 1)
    count = max(1, plan.calib_tokens // CONTEXT_TOKENS)
    fitted, held_back = windows.calibration_windows(
        checkpoint, prepared.calibration_source, count, held_back_windows(count), CONTEXT_TOKENS
    )
    recipe = Recipe(profile, plan.group_size, options.method, options.tune_steps, options.router, options.seed)
    store = _store(prepared, checkpoint, recipe, fitted)
    if store.finished:
        progress(f"resuming behind {store.finished} finished steps", 1, 1)
    if len(options.profiles) > 1:
        progress(f"slices {profile}", 1, 1)
    calibrated = calibrate(checkpoint, fitted, held_back, recipe, store, progress)
    of_this = worth(calibrated, options.floor_ratio)
    return _Trial(checkpoint, calibrated, of_this, store, int(fitted.size), int(held_back.size))


def _calib_tokens(options: Options) -> int:
    return METHODS[options.method].calib_tokens if options.calib_tokens is None else options.calib_tokens


def _store(prepared: Prepared, checkpoint: Checkpoint, recipe: Recipe, fitted: NDArray[np.int64]) -> Store:
    """Where this very calibration keeps what it has finished: beside the first bundle, under a hidden name."""
    digest = sha256(repr((recipe, METHODS[recipe.method])).encode() + fitted.tobytes())
    for name, parameter in checkpoint.model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().numpy())
    first = next(iter(prepared.options.outputs))
    name = f".{prepared.source.name}.{str(recipe.profile).replace(',', '')}.calibration"
    return Store(first.parent / name, digest.hexdigest())


def write_calibrated(
    prepared: Prepared,
    output: Path,
    checkpoint: Checkpoint,
    calibrated: Calibrated,
    calibration: dict[str, Any],
    progress: Report = no_report,
) -> bundle_manifest.Manifest:
    """Lower a calibrated model for one of the plan's outputs and write it there."""
    from .write import bundle_parts

    options, target = prepared.options, prepared.options.outputs[output]
    engines = target.engines(options.engines)
    spec = KernelSpec(calibrated.profile, calibrated.group_size, options.activation_bits)
    with bundle_parts.writing(output, options.force) as folder:
        for engine in engines:
            WRITERS[engine](Work(target, checkpoint, calibrated, spec, folder, progress))
        _write_tokenizer(checkpoint, folder)
        bundle_parts.write_json(folder / "genai_config.json", _engine_config(checkpoint, target, engines))
        manifest = _manifest(prepared, output, checkpoint, calibrated, calibration, folder)
        bundle_manifest.write(manifest, folder)
    return manifest


@dataclass(frozen=True)
class Work:
    """What a writer is given: a calibrated model, the machine it is for, and the folder of its bundle."""

    target: Target
    checkpoint: Checkpoint
    calibrated: Calibrated
    spec: KernelSpec
    folder: Path
    progress: Report


def _write_onnx(work: Work) -> None:
    from .lower.onnx import lower
    from .write import bundle_parts

    target, folder, progress = work.target, work.folder, work.progress
    model, tensors = lower(work.checkpoint, work.calibrated, target.layout, work.spec.activation_bits)
    bundle_parts.write_model(
        model, tensors, folder, lambda done, total: progress(f"writing {folder.stem}", done, total)
    )
    if target.native:
        from mbq_targets.build import build_ops_library

        progress(f"compiling kernels for {target.name}", 0, 1)
        (folder / "lib").mkdir()
        build_ops_library(target, work.spec, folder / bundle_manifest.OPS_LIBRARY)
        progress(f"compiling kernels for {target.name}", 1, 1)


def _write_tvm(work: Work) -> None:
    from mbq_targets.build import build_decoder

    folder, progress = work.folder, work.progress
    what = f"compiling the decoder for {work.target.name}"
    progress(what, 0, 1)
    lowered = lower_tvm.lower(work.checkpoint, work.calibrated, work.spec)
    build_decoder(work.target, work.spec, lowered.module, folder / bundle_manifest.DECODER_LIBRARY)
    progress(what, 1, 1)
    tvm_weights.write(
        lowered.tensors, lowered.entries, folder / WEIGHTS, lambda done, total: progress("writing weights", done, total)
    )


def _write_gpu(work: Work) -> None:
    """The plan of launches, the kernels as text, and the weights."""
    from .lower.gpu import lower
    from .write import bundle_parts

    folder = work.folder
    plan, texts, tensors = lower(work.checkpoint, work.calibrated, work.target)
    (folder / "gpu").mkdir()
    for name, text in texts.items():
        (folder / "gpu" / name).write_text(text, encoding="utf-8")
    plan_file, weights_file = bundle_manifest.GPU_FILES
    bundle_parts.write_json(folder / plan_file, plan)
    places = {name: plan["buffers"][name]["offset"] for name in tensors}
    what = f"writing {folder.stem}"
    bundle_parts.write_tensors(
        tensors, places, folder / weights_file, lambda done, total: work.progress(what, done, total)
    )


WRITERS: dict[str, Callable[[Work], None]] = {
    "onnx": _write_onnx,
    "tvm": _write_tvm,
    "opencl": _write_gpu,
    "webgpu": _write_gpu,
}
"""By engine: what it needs in the bundle besides the tokenizer."""

ENGINE_CHOICES = {"onnx": ("onnx",), "tvm": ("tvm",), "both": ("onnx", "tvm")}
"""What ``--engine`` takes; a GPU target has an engine of its own."""


def _write_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    checkpoint.tokenizer.save_pretrained(folder)
    checkpoint.model.generation_config.save_pretrained(folder)


def _eos_token_ids(checkpoint: Checkpoint) -> list[int]:
    """Every id that ends a reply: the generation config's, the tokenizer's and the config's."""
    seen: list[int] = []
    for owner in (checkpoint.model.generation_config, checkpoint.tokenizer, checkpoint.model.config):
        ids = getattr(owner, "eos_token_id", None)
        seen += [ids] if isinstance(ids, int) else (ids or [])
    return [i for i in dict.fromkeys(seen) if i < checkpoint.decoder.vocab_size]


def _engine_config(checkpoint: Checkpoint, target: Target, engines: tuple[str, ...]) -> dict[str, Any]:
    from mbq_runtime.bundle.genai_config import genai_config

    d, tokenizer = checkpoint.decoder, checkpoint.tokenizer
    return genai_config(
        family=d.family.model_type,
        vocab_size=d.vocab_size,
        context_length=d.context_length,
        layers=d.layers,
        hidden_size=d.hidden_size,
        heads=d.heads,
        kv_heads=d.kv_heads,
        head_dim=d.head_dim,
        eos_token_ids=_eos_token_ids(checkpoint),
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        native=target.native and "onnx" in engines,
    )


def tool_versions(names: Iterable[str]) -> dict[str, str]:
    """Of the packages that are installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _manifest(
    prepared: Prepared,
    output: Path,
    checkpoint: Checkpoint,
    calibrated: Calibrated,
    calibration: dict[str, Any],
    folder: Path,
) -> bundle_manifest.Manifest:
    from .calibrate import quality_floor

    options, d = prepared.options, checkpoint.decoder
    plan = replace(prepared.plans[output], router_kind=calibrated.router_kind)
    target = options.outputs[output]
    engines = target.engines(options.engines)
    low, high = float(plan.profile.min_bits), float(CODE_BITS)
    return bundle_manifest.Manifest(
        model=bundle_manifest.ModelFacts(
            name=prepared.source.name,
            architecture=d.family.architecture,
            family=d.family.model_type,
            parameters=checkpoint.parameters,
            vocab_size=d.vocab_size,
            hidden_size=d.hidden_size,
            layers=d.layers,
            context_length=d.context_length,
        ),
        target=bundle_manifest.TargetFacts(target.name, engines[0], target.arch, target.cpu, target.features),
        slices=plan.profile.slices,
        group_size=plan.group_size,
        layout=target.layout,
        budget=bundle_manifest.Budget(low, high, high),
        router=bundle_manifest.RouterFacts(calibrated.router_kind, plan.router_bytes),
        weights=bundle_manifest.Weights(
            plan.routed_parameters,
            {f"{bits:g}": plan.bytes_per_token(bits) for bits in planning.depth_budgets(plan.profile)},
            tuple(bundle_manifest.Linear(name, n, k) for name, (n, k) in d.unit_shapes().items()),
        ),
        calibration=calibration,
        seed=options.seed,
        tools=tool_versions(TOOLS),
        files=bundle_manifest.file_entries(folder),
        quality=bundle_manifest.Quality(
            calibrated.reference_perplexity, quality_floor(calibrated, options.floor_ratio), calibrated.curve
        ),
        engines=engines,
        activation_bits=options.activation_bits,
    )
