"""What an export will do, need and write, worked out from the config alone, before any long work."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mbq_runtime.bundle.manifest import ENGINE_FILES
from mbq_runtime.bundle.slice_profile import CODE_BITS, SliceProfile
from mbq_runtime.errors import UsageError

from . import devices, memory
from .format.nbits import packed_bits
from .methods import MLP_HIDDEN, ONLY, Phase
from .model.families import Decoder

if TYPE_CHECKING:
    from .export import Options

SCALE_BYTES = 4
"""Per group: a float16 scale and a float16 offset."""

AUTO_GROUP_SIZES = (64, 32)
"""What ``--group-size auto`` tries: the largest that keeps quality, then what divides more widths."""


def choose_group_size(decoder: Decoder, wanted: str) -> int:
    """The group size for ``--group-size``.  Raises UsageError naming the layers whose K it does not divide."""
    widths = {name: k for name, (_, k) in decoder.unit_shapes().items()}
    sizes = AUTO_GROUP_SIZES if wanted == "auto" else (int(wanted),)
    for size in sizes:
        bad = {name: k for name, k in widths.items() if k % size}
        if not bad:
            return size
    fits = [size for size in (128, 64, 32) if not any(k % size for k in widths.values())]
    name, k = next(iter(bad.items()))
    remedy = f"use --group-size {fits[0]}" if fits else "no group size of 32, 64 or 128 fits this model"
    raise UsageError(f"group size {size} does not divide K = {k} of {name} (and {len(bad) - 1} more layers); {remedy}")


@dataclass(frozen=True)
class Plan:
    """Sizes of one export.  ``layout`` is how the target stores planes."""

    decoder: Decoder
    profile: SliceProfile
    group_size: int
    layout: str
    router_kind: str
    calib_tokens: int
    tunings: Collection[Phase] = (ONLY,)
    """All that slices may go through."""
    in_memory: bool = False
    """Whether the weights stay in memory however large they are: those on a GPU do, and those of a GGUF file, which are
    decoded into it."""

    @property
    def router_bytes(self) -> int:
        """Size of the routers' parameters; of the largest kind while it is still to be chosen."""
        steps = self.profile.depths - 1
        widths = [k for _, k in self.decoder.unit_shapes().values()]
        rules = len(widths) * 8 * steps
        if self.router_kind not in ("auto", "mlp"):
            return rules
        return rules + sum(MLP_HIDDEN * (2 * k + 4 + 4 * steps) for k in widths)

    @property
    def routed_parameters(self) -> int:
        return sum(n * k for n, k in self.decoder.unit_shapes().values())

    @property
    def parameters(self) -> int:
        """All weights: routed, embedding when it is not the head, and norms left out."""
        d = self.decoder
        return self.routed_parameters + (0 if d.tied else d.vocab_size * d.hidden_size)

    def bytes_per_token(self, avg_bits: float) -> int:
        """Bytes of weights read for one decoded token at an average of ``avg_bits``."""
        scales = self.routed_parameters * SCALE_BYTES // self.group_size
        return round(self.routed_parameters * self.stored_bits(avg_bits) / 8) + scales + self.router_bytes

    def stored_bits(self, avg_bits: float) -> float:
        """Bits read per weight at an average of ``avg_bits``: more than that where fields are padded."""
        if self.layout == "mbq16":
            return avg_bits
        stored, at = 0.0, 0
        for width in self.profile.slices:
            stored += packed_bits(width) * min(1.0, max(0.0, (avg_bits - at) / width))
            at += width
        return stored

    @property
    def disk_bytes(self) -> int:
        """Size of the bundle, to a few percent."""
        d = self.decoder
        per_weight = self.stored_bits(CODE_BITS) / 8 + SCALE_BYTES / self.group_size
        rotary = len({d.rotary_kind(layer) for layer in range(d.layers)}) * d.context_length * d.head_dim * 4
        return round(self.parameters * per_weight) + rotary + self.router_bytes + (16 << 20)

    @property
    def weights_file_bytes(self) -> int:
        """Size of the file that holds the float32 weights while calibration lasts; 0 when memory does."""
        return 0 if self.in_memory or 4 * self.parameters <= memory.KEPT_WEIGHT_BYTES else 4 * self.parameters

    @property
    def work_bytes(self) -> int:
        """What calibration keeps beside the first output until it is done: weights as they were, and as they become."""
        return self.weights_file_bytes + round(self.routed_parameters * (1 + SCALE_BYTES / self.group_size))

    @property
    def peak_memory_bytes(self) -> int:
        """Most memory the export holds at once, to about a fifth."""
        return max(memory.by_stage(self).values())


def depth_budgets(profile: SliceProfile) -> list[float]:
    """Average bits a size is stated at: whole and half bits of the profile's range."""
    steps = range(2 * profile.min_bits, 2 * CODE_BITS + 1)
    return [step / 2 for step in steps]


def problems(plans: dict[Path, Plan], options: Options, device: str) -> list[str]:
    """Everything that would stop the export later, one line each.  plans: by output folder; device: to calibrate on."""
    outputs, engines, activation_bits = options.outputs, options.engines, options.activation_bits
    found = [
        f"{output}: it exists; choose another --output, or --force to replace it"
        for output in outputs
        if output.exists() and not options.force
    ]
    found += [
        f"engine {engine}: it does not run on target {target.name}; use --engine onnx, or another target"
        for target in outputs.values()
        for engine in target.engines(engines)
        if target.layout not in ENGINE_FILES[engine]
    ]
    found += [
        f"--activations {activation_bits}: {target.name} computes with floating-point activations; leave it out"
        for target in outputs.values()
        if target.gpu and activation_bits != 16
    ]
    if any(target.native or target.gpu for target in outputs.values()):
        found += [
            f"compiled kernels need the package {package}: pip install 'mbq-export[export]'"
            for module, package in (("tvm", "apache-tvm"), ("ziglang", "ziglang"))
            if importlib.util.find_spec(module) is None
        ]
    needed: dict[Path, int] = {}
    for output, plan in plans.items():
        parent = next(p for p in (output, *output.absolute().parents) if p.is_dir())
        size = len(outputs[output].engines(engines)) * plan.disk_bytes + (0 if needed else plan.work_bytes)
        needed[parent] = needed.get(parent, 0) + size
    for parent, size in needed.items():
        free = shutil.disk_usage(parent).free
        if free < size:
            found.append(
                f"{parent}: {free >> 20} MB free, {size >> 20} MB are needed; free some or choose another --output"
            )
        if not os.access(parent, os.W_OK):
            found.append(f"{parent}: not writable; choose another --output")
    needed_memory = max(plan.peak_memory_bytes for plan in plans.values())
    available = devices.free_bytes(device)
    if available < needed_memory:
        where = "this machine" if device == devices.CPU else device
        found.append(f"about {needed_memory >> 20} MB of memory are needed, {where} has {available >> 20} MB")
    return found
