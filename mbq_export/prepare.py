"""The first stage of an export: plan it, and refuse early what would fail after long work."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mbq_runtime.bundle.facts import GROUP_SIZES
from mbq_runtime.bundle.file_names import ENGINE_FILES
from mbq_runtime.bundle.layout import KEY_LANES
from mbq_runtime.errors import UsageError
from mbq_runtime.locks import place_behind_links
from mbq_targets.constants import MOST_HEAD_DIM
from mbq_targets.machines import Target

from . import devices
from .data.windows import TextSource, open_source
from .lines import one_line
from .methods import METHODS, tunings
from .model.boundary import reading
from .model.loading import check_tokens, left_out, read_config
from .model.shape import Decoder
from .model.source import ModelSource, locate
from .options import Options
from .plan import Plan

log = logging.getLogger(__name__)

AUTO_GROUP_SIZES = (64, 32)
"""What ``--group-size auto`` tries, in this order: 64 gives the better quality, 32 divides more widths."""


STOCK_ROTATION_STEP = 16
"""ONNX Runtime's attention rotates a multiple of so many channels of a head."""


@dataclass(frozen=True)
class Prepared:
    """A checked export, before any work.

    options: what was asked for; source: where the model lies; text: what it is calibrated on;
    plans: the sizes of each output, with the first profile while several are to be tried;
    device: where to calibrate, as torch names it.
    """

    options: Options
    source: ModelSource
    text: TextSource
    plans: dict[Path, Plan]
    device: str
    left_out: tuple[str, ...] = ()
    """Parts of the model that are not exported, such as vision."""

    @property
    def plan(self) -> Plan:
        """The plan of the first output.  What does not depend on the target is the same in all plans."""
        return next(iter(self.plans.values()))


def prepare(options: Options, *, dry_run: bool = False) -> Prepared:
    """Plan an export.

    Args:
        options: what was asked for.
        dry_run: whether nothing will be written, so that a bundle may be where the output would go.

    Raises:
        UsageError: an option does not fit the model, the targets or this machine.
        ModelError: the model is missing, broken or of a family that has no lowering.
    """
    calib_tokens = _calib_tokens(options)
    _check_numbers(options, calib_tokens)
    with reading(one_line(options.model, 80), "the model"):
        source = locate(options.model)
    decoder = read_config(source)
    check_tokens(source, decoder)
    group_size = choose_group_size(decoder, options.group_size)
    phases = {phase for profile in options.profiles for phase in tunings(options.method, profile, options.tune_steps)}
    plans = {
        output: Plan(
            decoder, options.profiles[0], group_size, target.layout, options.router, calib_tokens=calib_tokens,
            tunings=phases, in_memory=True, kv_bits=choose_kv_bits(decoder, target, options.kv_bits),
        )
        for output, target in options.outputs.items()
    }  # fmt: skip
    device = devices.choose(options.device, next(iter(plans.values())).peak_memory_bytes)
    if device == devices.CPU and source.gguf is None:
        plans = {output: replace(plan, in_memory=False) for output, plan in plans.items()}
    found = problems(plans, replace(options, force=options.force or dry_run), device)
    if found:
        raise UsageError("; ".join(found))
    log.info("%s: groups of %d, calibrated on %s", source.name, group_size, device)
    return Prepared(
        options, source, open_source(options.calib_data, replies=not METHODS[options.method].brief), plans, device,
        left_out(source),
    )  # fmt: skip


def _calib_tokens(options: Options) -> int:
    return METHODS[options.method].calib_tokens if options.calib_tokens is None else options.calib_tokens


def _check_numbers(options: Options, calib_tokens: int) -> None:
    if calib_tokens < 1:
        default = METHODS[options.method].calib_tokens
        raise UsageError(f"--calib-tokens {calib_tokens}: at least 1 is needed; {default} is the default")
    if options.tune_steps and not METHODS[options.method].tuning_steps:
        raise UsageError(f"--tune-steps {options.tune_steps}: the method {options.method} tunes nothing; leave it out")


def choose_group_size(decoder: Decoder, wanted: str) -> int:
    """The number of weights per scale.

    Args:
        decoder: the model, whose layers' input widths (K) the group size must divide.
        wanted: a number, or "auto".

    Raises:
        UsageError: the group size does not divide every K.
    """
    widths = {name: k for name, (_, k) in decoder.unit_shapes().items()}
    sizes = AUTO_GROUP_SIZES if wanted == "auto" else (int(wanted),)
    for size in sizes:
        bad = {name: k for name, k in widths.items() if k % size}
        if not bad:
            return size
    known = sorted(GROUP_SIZES, reverse=True)
    fits = [size for size in known if not any(k % size for k in widths.values())]
    name, k = next(iter(bad.items()))
    remedy = f"use --group-size {fits[0]}" if fits else "no group size of 32, 64 or 128 fits this model"
    raise UsageError(f"group size {size} does not divide K = {k} of {name} (and {len(bad) - 1} more layers); {remedy}")


def choose_kv_bits(decoder: Decoder, target: Target, wanted: int | Literal["auto"]) -> int:
    """The bits of a cached key or value.

    Args:
        decoder: the model, whose heads must suit the kernels.
        target: the machine, which must have kernels.
        wanted: a number, or "auto" for 8 where there are kernels for them.
    """
    if wanted != "auto":
        return wanted
    suits = target.native and not decoder.some_share and not _odd_heads(decoder)
    return 8 if suits else 32


def _odd_heads(decoder: Decoder) -> list[int]:
    """Widths of heads that the kernels of 8-bit keys and values do not take."""
    widths = sorted({of.head_dim for of in decoder.caches.values()})
    return [width for width in widths if width % KEY_LANES or width > MOST_HEAD_DIM]


def problems(plans: dict[Path, Plan], options: Options, device: str) -> list[str]:
    """Everything that would stop the export later, one line each.

    Args:
        plans: the plan of each output folder.
        options: what was asked for.
        device: where to calibrate, as torch names it.
    """
    decoder = next(iter(plans.values())).decoder
    return [
        *_bad_options(options),
        *_without_kernels(decoder, options),
        *_odd_rotations(plans, options),
        *_missing_packages(options),
        *_bad_folders(plans, options),
        *_too_little_memory(max(plan.peak_memory_bytes for plan in plans.values()), device),
    ]


def _bad_options(options: Options) -> Iterator[str]:
    for output in options.outputs:
        if output.exists() and not options.force:
            yield f"{output}: it exists; choose another --output, or --force to replace it"
    for target in options.outputs.values():
        for engine in target.engines(options.engines):
            if target.layout not in ENGINE_FILES[engine]:
                yield (
                    f"engine {engine}: it does not run on target {target.name}; use --engine onnx, or another target"
                )
    for profile in options.profiles:
        if profile.depths == 1 and options.router == "mlp":
            yield f"--router mlp: slices {profile} have one depth, so there is nothing to choose; leave it out"
    for target in options.outputs.values():
        if target.gpu and options.activation_bits != 16:
            yield (
                f"--activations {options.activation_bits}: {target.name} computes with floating-point activations; "
                "leave it out"
            )
        if options.kv_bits == 8 and not target.native:
            yield f"--kv {options.kv_bits}: {target.name} has float32 keys and values alone; leave it out"


def without_gpu_kernels(decoder: Decoder) -> list[str]:
    """The parts of a model that have no GPU kernel.

    Args:
        decoder: shape of the model.
    """
    parts = {
        "short convolutions": decoder.layers_of("conv_in"),
        "delta nets": decoder.layers_of("delta_in"),
        "experts": decoder.layers_of("experts_in"),
        "gates of heads": decoder.head_gates,
        "per-layer embeddings": decoder.per_layer_size,
        "norms of values": decoder.family.value_norms,
        "scalars of layers": decoder.family.layer_scalars,
        "blocks that share keys and values": decoder.some_share,
    }
    return [part for part, there in parts.items() if there]


def _without_kernels(decoder: Decoder, options: Options) -> Iterator[str]:
    if found := without_gpu_kernels(decoder):
        for target in options.outputs.values():
            if target.gpu:
                yield f"target {target.name}: {', '.join(found)} have no GPU kernel; choose a processor's target"
    if options.kv_bits != 8:
        return
    if decoder.some_share:
        yield f"--kv {options.kv_bits}: blocks that share keys and values have them in float32 alone; leave it out"
    for head_dim in _odd_heads(decoder):
        yield (
            f"--kv {options.kv_bits}: heads of {head_dim} channels; kernels need a multiple of {KEY_LANES}, at "
            f"most {MOST_HEAD_DIM}; leave it out"
        )


def _odd_rotations(plans: dict[Path, Plan], options: Options) -> Iterator[str]:
    """ONNX Runtime's attention, which has float32 keys and values, rotates 16 channels at once."""
    for output, target in options.outputs.items():
        decoder, norms = plans[output].decoder, plans[output].decoder.family.head_norms
        apart = norms is not None and norms.rotated_first  # another operator rotates
        if apart or plans[output].kv_bits != 32 or "onnx" not in target.engines(options.engines):
            continue
        remedy = "leave --kv out" if target.native else "choose a target with kernels, such as host"
        if decoder.some_share or _odd_heads(decoder):  # these have no kernels of 8-bit keys and values
            remedy = "use --engine tvm" if target.native else f"{remedy}, and --engine tvm"
        for rotated in decoder.rotated:
            if rotated % STOCK_ROTATION_STEP:
                yield (
                    f"target {target.name}: {rotated} channels of a head are rotated; ONNX Runtime's attention needs a "
                    f"multiple of {STOCK_ROTATION_STEP}; {remedy}"
                )


def _missing_packages(options: Options) -> Iterator[str]:
    if any(target.native or target.gpu for target in options.outputs.values()):
        for module, package in (("tvm", "apache-tvm"), ("ziglang", "ziglang")):
            if importlib.util.find_spec(module) is None:
                yield f"compiled kernels need the package {package}: pip install 'mbq-export[export]'"


def _bad_folders(plans: dict[Path, Plan], options: Options) -> Iterator[str]:
    needed: dict[Path, int] = {}
    for output, plan in plans.items():
        place = place_behind_links(output)
        parent = next(p for p in (place, *place.absolute().parents) if p.is_dir())
        engines = options.outputs[output].engines(options.engines)
        size = len(engines) * plan.disk_bytes + (0 if needed else plan.work_bytes)
        needed[parent] = needed.get(parent, 0) + size
    for parent, size in needed.items():
        free = shutil.disk_usage(parent).free
        if free < size:
            yield f"{parent}: {free >> 20} MB free, {size >> 20} MB are needed; free some or choose another --output"
        if not os.access(parent, os.W_OK):
            yield f"{parent}: not writable; choose another --output"


def _too_little_memory(needed_bytes: int, device: str) -> Iterator[str]:
    available = devices.free_bytes(device)
    if available < needed_bytes:
        where = "this machine" if device == devices.CPU else device
        yield f"about {needed_bytes >> 20} MB of memory are needed, {where} has {available >> 20} MB"
