"""``mbq web``"""

from __future__ import annotations

from pathlib import Path

import click

from mbq_runtime.printable import printable

from .common import bundle_argument, progress_line


@click.command("web")
@bundle_argument
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder of the page; it must not exist.")
def command(bundle: Path, output: Path) -> None:
    """Write a page that runs BUNDLE in a browser, on WebGPU, to a folder that any file server can offer.

    BUNDLE must be exported with --target webgpu.  The page and the bundle are all that is needed: the page asks no
    other host.
    """
    from mbq_runtime.web import write_site

    with progress_line(f"writing {printable(str(output))}") as progress:
        manifest = write_site(bundle, output, progress)
    size = printable(f"{output}: {manifest.model.name}, {manifest.total_bytes / 1e6:.1f} MB")
    click.echo(f"{size}; try it: python -m http.server --directory {printable(str(output))}", err=True)
    click.echo(str(output))
