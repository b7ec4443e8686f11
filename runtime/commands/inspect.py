"""``mbq inspect``"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from mbq_runtime.manifest import Manifest

from .common import bundle_argument, json_option


@click.command("inspect")
@bundle_argument
@json_option
def command(bundle: Path, as_json: bool) -> None:
    """Show what is in the bundle in folder BUNDLE, and whether it runs on this machine."""
    from mbq_runtime import isa, manifest

    found = manifest.read(bundle)
    problem = isa.problem(found.target, isa.this_machine())
    if as_json:
        facts = asdict(found)
        click.echo(
            json.dumps({**facts, "total_bytes": found.total_bytes, "runs_here": problem is None, "problem": problem})
        )
        return
    width = max(len(label) for label, _ in _lines(found))
    for label, value in [*_lines(found), ("runs here", "yes" if problem is None else f"no: {problem}")]:
        click.echo(f"{label:<{width}}  {value}")


def _lines(m: Manifest) -> list[tuple[str, str]]:
    machine = " ".join(filter(None, (m.target.arch, m.target.cpu, *m.target.features)))
    per_token = sorted(((float(bits), size) for bits, size in m.weights.bytes_per_token.items()))
    return [
        ("model", f"{m.model.name} ({m.model.architecture}), {m.model.parameters / 1e6:.1f} M parameters"),
        ("context", f"{m.model.context_length} tokens"),
        ("target", f"{m.target.name} ({machine})"),
        ("engines", ", ".join(m.engines)),
        ("slices", f"{m.profile}: {'/'.join(map(str, m.profile.depth_bits))} bits, groups of {m.group_size}"),
        ("layout", f"{m.layout} ({'own kernels' if m.native else 'stock operators'})"),
        ("budget", f"{m.budget.min_bits:g} to {m.budget.max_bits:g} bits, {m.budget.default_bits:g} by default"),
        ("routers", f"{m.router.kind}, {m.router.bytes / 1e3:.1f} kB"),
        ("routed", f"{m.weights.routed_parameters / 1e6:.1f} M weights in {len(m.weights.linears)} matrices"),
        *((f"at {bits:g} bits", f"{size / 1e6:.1f} MB read per token") for bits, size in per_token),
        ("size", f"{m.total_bytes / 1e6:.1f} MB in {len(m.files)} files"),
    ]
