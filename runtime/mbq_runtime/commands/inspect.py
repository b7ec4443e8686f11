"""``mbq inspect``"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mbq_runtime import tables
from mbq_runtime.bundle.file_names import GPU_FILES
from mbq_runtime.bundle.manifest import Manifest
from mbq_runtime.trust.code import description, gpu_code, native_code
from mbq_runtime.version import DISTRIBUTION, installed_version

from .common import bundle_argument, json_option

if TYPE_CHECKING:
    from mbq_runtime.bundle import isa
    from mbq_runtime.bundle.gpu_plan import Plan


@click.command("inspect")
@bundle_argument
@json_option
def command(bundle: Path, as_json: bool) -> None:
    """Show what is in BUNDLE, and whether it runs on this machine."""
    from mbq_runtime.bundle import gpu_plan, isa, manifest
    from mbq_runtime.bundle.check import check_bundle
    from mbq_runtime.bundle.genai_config import cache_bytes, state_bytes

    found = manifest.read(bundle)
    settings = check_bundle(bundle, found)
    context_bytes = {"each_token": cache_bytes(found, settings), "states": state_bytes(found, settings)}
    machine = isa.this_machine()
    problem = isa.problem(found.target, machine) or (isa.mount_problem(bundle) if found.native else None)
    plan = gpu_plan.read_plan(bundle) if GPU_FILES[0] in {entry.name for entry in found.files} else None
    if as_json:
        facts = asdict(found) | {"code": [entry.name for entry in [*native_code(found), *gpu_code(found)]]}
        facts["context_bytes"] = context_bytes
        if plan is not None:
            facts["gpu_needs"] = asdict(plan.needs)
        click.echo(
            json.dumps({**facts, "total_bytes": found.total_bytes, "runs_here": problem is None, "problem": problem})
        )
        return
    here = "yes" if problem is None else f"no: {problem}"
    lines = [
        *_lines(found, context_bytes["each_token"]),
        *(_gpu_lines(found, plan) if plan else ()),
        ("machine", _machine_line(machine)),
    ]
    code = description(found)
    lines.append(("made with", _made_with(found, has_code=bool(code))))
    if code:
        lines.append(("code", code))
    if problem or not plan:
        lines.append(("runs here", here))
    click.echo(tables.pairs(lines))


_SOFTWARE = {
    "opencl": "OpenCL 1.2 or newer (the GPU's driver), pip install 'mbq-export[opencl]'",
    "webgpu": "a driver for Vulkan, Metal or Direct3D 12, pip install 'mbq-export[webgpu]'",
}


def _machine_line(machine: isa.Machine) -> str:
    """This machine, and what the engines miss on it."""
    return f"{machine}; {machine.lacks}" if machine.lacks else str(machine)


def _made_with(m: Manifest, has_code: bool) -> str:
    """The release that made the bundle.  Where it is not this one, the bundle's kernels are not this one's."""
    made, here = m.tools.get(DISTRIBUTION, "of an unknown version"), installed_version()
    note = f"; a new export has the kernels of {here}, which is installed" if has_code and made != here else ""
    return f"{DISTRIBUTION} {made}{note}"


def _gpu_lines(m: Manifest, plan: Plan) -> list[tuple[str, str]]:
    """What the device must have.  The engine checks it when it loads the bundle."""
    needs, launches = plan.needs, plan.decode_launches
    cache = sum(buffer.bytes for buffer in plan.buffers.values() if buffer.is_cache)
    fixed = sum(buffer.bytes for buffer in plan.buffers.values() if not buffer.is_cache)
    return [
        ("needs", _SOFTWARE[m.target.engine]),
        ("", f"{fixed / 1e6:.1f} MB of memory and {cache / 1e3:.1f} kB a token"),
        ("", f"a buffer of {needs.buffer_bytes / 1e6:.1f} MB"),
        ("", f"work-groups of {needs.group_items} items with {needs.local_bytes} bytes of local memory"),
        ("", f"{needs.bindings} storage buffers in a kernel; no half floats, no subgroups"),
        ("launches", f"{len(launches)} a token, of {len(plan.kernels)} kernels ({plan.dialect})"),
    ]


def _left_out(m: Manifest) -> str:
    whole = sum(entry.size for entry in m.files)
    return f", trimmed from {whole / 1e6:.1f} MB" if m.trimmed else ""


def _cached(m: Manifest) -> str:
    return "" if m.kv_bits == 32 else f" ({m.kv_bits}-bit keys and values)"


def _lines(m: Manifest, token_bytes: int) -> list[tuple[str, str]]:
    machine = " ".join(filter(None, (m.target.arch, m.target.cpu, *m.target.features)))
    activations = "float activations" if m.target.engine in _SOFTWARE else f"{m.activation_bits}-bit activations"
    per_token = sorted(((float(bits), size) for bits, size in m.weights.bytes_per_token.items()))
    return [
        ("model", f"{m.model.name} ({m.model.architecture}), {m.model.parameters / 1e6:.1f} M parameters"),
        ("context", f"{m.model.context_length} tokens, each takes {token_bytes / 1e3:.1f} kB of memory{_cached(m)}"),
        ("target", f"{m.target.name} ({machine})"),
        ("engines", ", ".join(m.engines)),
        ("slices", f"{m.profile}: {'/'.join(map(str, m.profile.depth_bits))} bits, groups of {m.group_size}"),
        ("layout", f"{m.layout} ({'own kernels' if m.native else 'stock operators'}), {activations}"),
        ("budget", f"{m.budget.min_bits:g} to {m.budget.max_bits:g} bits, {m.budget.default_bits:g} by default"),
        ("routers", f"{m.router.kind}, {m.router.bytes / 1e3:.1f} kB"),
        ("routed", f"{m.weights.routed_parameters / 1e6:.1f} M weights in {len(m.weights.linears)} matrices"),
        *((f"at {bits:g} bits", f"{size / 1e6:.1f} MB read per token") for bits, size in per_token),
        ("size", f"{m.total_bytes / 1e6:.1f} MB in {len(m.files)} files{_left_out(m)}"),
    ]
