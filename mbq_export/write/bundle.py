"""The last stage of an export: lower a calibrated model for one target and write its bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mbq_runtime.bundle import manifest as bundle_manifest
from mbq_runtime.bundle.facts import Budget, Linear, ModelFacts, Quality, RouterFacts, TargetFacts, Weights
from mbq_runtime.bundle.genai_config import genai_config
from mbq_runtime.bundle.listed_files import FileRange, file_entries
from mbq_runtime.bundle.slice_profile import CODE_BITS
from mbq_runtime.trust import code
from mbq_runtime.trust.signature import sign
from mbq_targets.machines import Target
from mbq_targets.spec import KernelSpec

from ..calibrated import Calibrated, quality_floor
from ..model.checkpoint import Checkpoint
from ..model.stop_tokens import stop_token_ids
from ..plan import depth_budgets
from ..prepare import Prepared
from ..progress import Report, no_report
from ..versions import installed
from . import files, parts
from .check import check_bundle
from .engines import WRITERS, Work

TOOLS = ("mbq-export", "torch", "transformers", "onnx", "apache-tvm", "ziglang", "numpy")
"""Packages whose versions the manifest names."""


def write_bundle(
    prepared: Prepared,
    output: Path,
    checkpoint: Checkpoint,
    calibrated: Calibrated,
    *,
    calibration: Mapping[str, Any],
    progress: Report = no_report,
) -> bundle_manifest.Manifest:
    """Write the bundle of one target.  The folder appears when it is complete.

    Args:
        prepared: the export.
        output: one of the folders in ``prepared.options.outputs``.
        checkpoint: the model.
        calibrated: its slices and routers.
        calibration: facts about the calibration, for the manifest.
        progress: told how far the work is.

    Returns:
        The manifest, as it is written.

    Raises:
        BundleError: the folder cannot be written.
        ModelError: the bundle does not say what the model says.
        BuildError: a kernel library cannot be compiled.
    """
    options, target = prepared.options, prepared.options.outputs[output]
    engines = target.engines(options.engines)
    kv_bits = prepared.plans[output].kv_bits
    spec = KernelSpec(calibrated.profile, calibrated.group_size, options.activation_bits, kv_bits)
    with files.writing(output, options.force) as folder:
        work = Work(target, checkpoint, calibrated, spec, folder, progress)
        ranges = [WRITERS[engine](work) for engine in engines]
        checkpoint.tokenizer.save_pretrained(folder)
        checkpoint.model.generation_config.save_pretrained(folder)
        files.write_json(folder / "genai_config.json", _engine_config(checkpoint, target, engines, kv_bits))
        manifest = _manifest(prepared, output, work, ranges, calibration)
        bundle_manifest.write(manifest, folder)
        if options.sign is not None:
            sign(folder, options.sign)
        # What was made here runs here, also where the same bundle is pulled.
        code.trust(manifest)
        check_bundle(work, manifest)
    return manifest


def _eos_token_ids(checkpoint: Checkpoint) -> list[int]:
    """Every token id that ends a reply, of the configs and of the chat template."""
    owners = [checkpoint.model.generation_config, checkpoint.tokenizer, checkpoint.model.config]
    return stop_token_ids(checkpoint.tokenizer, owners, checkpoint.decoder.vocab_size)


def _engine_config(checkpoint: Checkpoint, target: Target, engines: tuple[str, ...], kv_bits: int) -> dict[str, Any]:
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
        convolutions=[layer for layer in range(d.layers) if d.mixer(layer) == "conv"],
        conv_cache_size=d.conv_taps - 1 if d.conv_taps else 0,
        deltas=d.delta is not None,
        kv_bits=kv_bits,
    )


def _manifest(
    prepared: Prepared,
    output: Path,
    work: Work,
    ranges: list[list[FileRange]],
    calibration: Mapping[str, Any],
) -> bundle_manifest.Manifest:
    options, calibrated, d = prepared.options, work.calibrated, work.checkpoint.decoder
    plan = replace(prepared.plans[output], profile=calibrated.profile, router_kind=calibrated.router_kind)
    target = work.target
    engines = target.engines(options.engines)
    low, high = float(plan.profile.min_bits), float(CODE_BITS)
    entries = file_entries(work.folder)
    return bundle_manifest.Manifest(
        model=ModelFacts(
            name=prepared.source.name,
            architecture=d.family.architecture,
            family=d.family.model_type,
            parameters=work.checkpoint.parameters,
            vocab_size=d.vocab_size,
            hidden_size=d.hidden_size,
            layers=d.layers,
            context_length=d.context_length,
            states={} if d.delta is None else d.delta.states,
            attention=d.block_heads,
        ),
        target=TargetFacts(target.name, engines[0], target.arch, target.cpu, target.features),
        slices=plan.profile.slices,
        group_size=plan.group_size,
        layout=target.layout,
        budget=Budget(low, high, high),
        router=RouterFacts(calibrated.router_kind, plan.router_bytes),
        weights=Weights(
            plan.routed_parameters,
            {f"{bits:g}": plan.bytes_per_token(bits) for bits in depth_budgets(plan.profile)},
            tuple(Linear(name, n, k) for name, (n, k) in d.unit_shapes().items()),
        ),
        calibration=dict(calibration),
        seed=options.seed,
        tools=installed(TOOLS),
        files=entries,
        quality=Quality(
            calibrated.reference_perplexity, quality_floor(calibrated, options.floor_ratio), calibrated.curve
        ),
        engines=engines,
        activation_bits=options.activation_bits,
        kv_bits=plan.kv_bits,
        parts=parts.joined(ranges),
    )
