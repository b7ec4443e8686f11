"""``mbq pull``"""

from __future__ import annotations

from pathlib import Path

import click

from .common import allow_http_option, key_option, pull_bundle


@click.command("pull")
@click.argument("source")
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@allow_http_option
@key_option
@click.option("--max-bits", type=float, help="Fetch only the depths of at most so many bits per weight.")
def command(source: str, folder: Path | None, allow_http: bool, key: Path | None, max_bits: float | None) -> None:
    """Fetch the bundle at SOURCE into FOLDER, or into the cache folder, and print the folder.

    SOURCE is https://HOST/FOLDER, hf:OWNER/NAME, hf:OWNER/NAME/FOLDER or file:FOLDER.  Each chunk is compared with its
    hash in the manifest.  The same command goes on after an end, and mends a bundle that was damaged.
    """
    from mbq_runtime.pull import Source

    found = Source.of(source, allow_http=allow_http)
    click.echo(str(pull_bundle(found, folder, allow_http=allow_http, key=key, max_bits=max_bits).folder))
