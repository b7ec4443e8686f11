"""``mbq verify``"""

from __future__ import annotations

from pathlib import Path

import click

from mbq_runtime.printable import printable

from .common import bundle_argument, key_option, progress_line


@click.command("verify")
@bundle_argument
@key_option
def command(bundle: Path, key: Path | None) -> None:
    """Check BUNDLE: hash of every file, engine settings, tokenizer, and shapes of the weights.

    A note says if the bundle does not run on this machine, which is no fault of the bundle.
    """
    from mbq_runtime.bundle import isa, manifest
    from mbq_runtime.bundle.check import check_bundle
    from mbq_runtime.bundle.verify import verify
    from mbq_runtime.engine.tokenizer import Tokenizer
    from mbq_runtime.trust import signature

    if key is not None:
        signature.verify(bundle, key)
    check_bundle(bundle, manifest.read(bundle))
    with progress_line("comparing hashes") as progress:
        found = verify(bundle, progress)
    Tokenizer(bundle)
    signed = f"; {key} has signed it" if key is not None else ""
    size = f"{len(found.files)} files, {found.total_bytes / 1e6:.1f} MB"
    click.echo(printable(f"{bundle}: {size}, all as the manifest says{signed}"))
    here = isa.problem(found.target, isa.this_machine())
    if problem := here or (isa.mount_problem(bundle) if found.native else None):
        click.echo(f"note: {printable(problem)}")
