"""``mbq trim``"""

from __future__ import annotations

from pathlib import Path

import click

from mbq_runtime.printable import printable

from .common import bundle_argument, progress_line


@click.command("trim")
@bundle_argument
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--max-bits", type=float, required=True, help="The depths of at most so many bits per weight stay.")
def command(bundle: Path, folder: Path | None, max_bits: float) -> None:
    """Copy BUNDLE without its deeper slices to FOLDER, and print the folder.  BUNDLE stays as it is.

    The copy gives the tokens of BUNDLE under the same ceiling.  Each chunk is compared with its hash.  Without FOLDER
    the copy lies beside BUNDLE, with the bits in its name.
    """
    from mbq_runtime.pull import trim

    folder = folder or Path(f"{bundle.resolve()}-{max_bits:g}bit")
    with progress_line(f"trimming {printable(str(bundle))}") as progress:
        done = trim(bundle, folder, max_bits, progress)
    budget = done.manifest.budget
    text = f"{folder}: {done.manifest.total_bytes / 1e6:.1f} MB, {budget.min_bits:g} to {budget.max_bits:g} bits"
    click.echo(printable(f"{text}, all as the manifest says"), err=True)
    click.echo(str(folder))
