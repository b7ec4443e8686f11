"""The whole road on the workstation: locate, plan, calibrate, lower, compile, write."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbq_runtime import manifest as bundle_manifest
from mbq_runtime.errors import UsageError
from mbq_runtime.profile import CODE_BITS, SliceProfile
from mbq_targets.table import Target

from . import calibration_data
from . import plan as planning
from .checkpoint import Checkpoint, Source, load, locate, read_config

if TYPE_CHECKING:
    from .calibrate import Calibrated

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many steps are done and how many there are."""

TOOLS = ("mbq-export", "torch", "transformers", "onnx", "apache-tvm", "ziglang", "numpy")


def no_progress(what: str, done: int, total: int) -> None:
    """The default: nobody is told."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for.  outputs: a folder for each target, all written from one calibration;
    calib_data: as ``calibration_data.open_source`` takes it."""

    model: str
    outputs: dict[Path, Target]
    profile: SliceProfile
    group_size: str
    router: str
    calib_data: str | None
    calib_tokens: int
    seed: int
    force: bool


@dataclass(frozen=True)
class Prepared:
    """A checked export: what will be done, and nothing done yet.  plans: one for each output."""

    options: Options
    source: Source
    calibration_source: calibration_data.Source
    plans: dict[Path, planning.Plan]

    @property
    def plan(self) -> planning.Plan:
        """The first output's; what does not hang on the target is the same in all."""
        return next(iter(self.plans.values()))


def prepare(options: Options) -> Prepared:
    """Work out the plan and refuse what would fail later.  Raises UsageError or ModelError."""
    from .routing.mlp import HIDDEN

    if options.calib_tokens < 1:
        raise UsageError(f"--calib-tokens {options.calib_tokens}: at least 1 is needed; 4096 is the default")
    source = locate(options.model)
    decoder = read_config(source)
    group_size = planning.choose_group_size(decoder, options.group_size)
    steps = options.profile.depths - 1
    widths = [k for _, k in decoder.unit_shapes().values()]
    router_bytes = len(widths) * 8 * steps
    if options.router == "mlp":
        router_bytes += sum(HIDDEN * (2 * k + 4 + 4 * steps) for k in widths)
    plans = {
        output: planning.Plan(decoder, options.profile, group_size, target.layout, router_bytes, options.calib_tokens)
        for output, target in options.outputs.items()
    }
    found = planning.problems(plans, options.outputs, options.force)
    if found:
        raise UsageError("; ".join(found))
    return Prepared(options, source, calibration_data.open_source(options.calib_data), plans)


def run(prepared: Prepared, progress: Progress = no_progress) -> dict[Path, bundle_manifest.Manifest]:
    """Do it, and return the manifest of each output.  Raises an MbqError; an unfinished bundle leaves nothing."""
    from .calibrate import CONTEXT_TOKENS, calibrate

    options = prepared.options
    progress("loading the model", 0, 1)
    started = time.monotonic()
    checkpoint = load(prepared.source)
    progress("loading the model", 1, 1)
    count = max(1, options.calib_tokens // CONTEXT_TOKENS)
    windows, _ = calibration_data.calibration_windows(
        checkpoint, prepared.calibration_source, count, max(1, count // 3), CONTEXT_TOKENS
    )
    calibrated = calibrate(
        checkpoint, windows, options.profile, prepared.plan.group_size, options.router, options.seed, progress
    )
    calibration = {
        "method": "rtn",
        "text": prepared.calibration_source.name,
        "tokens": int(windows.size),
        "seconds": round(time.monotonic() - started, 1),
    }
    return {
        output: _write_bundle(prepared, output, checkpoint, calibrated, calibration, progress)
        for output in options.outputs
    }


def _write_bundle(
    prepared: Prepared,
    output: Path,
    checkpoint: Checkpoint,
    calibrated: Calibrated,
    calibration: dict[str, Any],
    progress: Progress,
) -> bundle_manifest.Manifest:
    from . import bundle
    from .lower.onnx import lower

    options, target = prepared.options, prepared.options.outputs[output]
    with bundle.writing(output, options.force) as folder:
        model, tensors = lower(checkpoint, calibrated, target.layout)
        bundle.write_model(model, tensors, folder, lambda done, total: progress(f"writing {output.name}", done, total))
        del tensors
        _write_tokenizer(checkpoint, folder)
        bundle.write_json(folder / "genai_config.json", _engine_config(checkpoint, target))
        if target.native:
            from mbq_targets.build import build_ops_library

            progress(f"compiling kernels for {target.name}", 0, 1)
            (folder / "lib").mkdir()
            build_ops_library(target, options.profile, calibrated.group_size, folder / bundle_manifest.OPS_LIBRARY)
            progress(f"compiling kernels for {target.name}", 1, 1)
        manifest = _manifest(prepared, output, checkpoint, calibration, folder)
        bundle_manifest.write(manifest, folder)
    return manifest


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


def _engine_config(checkpoint: Checkpoint, target: Target) -> dict[str, Any]:
    from mbq_runtime.genai_config import genai_config

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
        native=target.native,
    )


def _tool_versions() -> dict[str, str]:
    versions = {}
    for name in TOOLS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _manifest(
    prepared: Prepared, output: Path, checkpoint: Checkpoint, calibration: dict[str, Any], folder: Path
) -> bundle_manifest.Manifest:
    options, plan, d = prepared.options, prepared.plans[output], checkpoint.decoder
    target = options.outputs[output]
    low, high = float(plan.profile.min_bits), float(CODE_BITS)
    return bundle_manifest.Manifest(
        model=bundle_manifest.ModelFacts(
            name=prepared.source.name,
            architecture=d.family.architecture,
            family=d.family.model_type,
            parameters=checkpoint.model.num_parameters(),
            vocab_size=d.vocab_size,
            hidden_size=d.hidden_size,
            layers=d.layers,
            context_length=d.context_length,
        ),
        target=bundle_manifest.TargetFacts(target.name, "onnx", target.arch, target.cpu, target.features),
        slices=plan.profile.slices,
        group_size=plan.group_size,
        layout=target.layout,
        budget=bundle_manifest.Budget(low, high, high),
        router=bundle_manifest.RouterFacts(options.router, plan.router_bytes),
        weights=bundle_manifest.Weights(
            plan.routed_parameters,
            {f"{bits:g}": plan.bytes_per_token(bits) for bits in planning.depth_budgets(plan.profile)},
            tuple(bundle_manifest.Linear(name, n, k) for name, (n, k) in d.unit_shapes().items()),
        ),
        calibration=calibration,
        seed=options.seed,
        tools=_tool_versions(),
        files=bundle_manifest.file_entries(folder),
    )
