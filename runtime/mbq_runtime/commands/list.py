"""``mbq list``"""

from __future__ import annotations

import json

import click

from mbq_runtime import tables
from mbq_runtime.printable import printable

from .common import json_option


@click.command("list")
@json_option
def command(as_json: bool) -> None:
    """Show the bundles that were pulled into the cache folder."""
    from mbq_runtime.pull import listed

    found = listed()
    if as_json:
        rows = [
            {
                "name": kept.name,
                "source": kept.source,
                "folder": str(kept.folder),
                "model": kept.manifest.model.name if kept.manifest else None,
                "target": kept.manifest.target.name if kept.manifest else None,
                "disk_bytes": kept.disk_bytes,
                "whole": kept.whole,
            }
            for kept in found
        ]
        click.echo(json.dumps(rows))
        return
    lines = [
        (
            kept.name,
            printable(kept.manifest.target.name) if kept.manifest else "unknown",
            f"{kept.disk_bytes / 1e6:.1f}",
            "yes" if kept.whole else "no",
            printable(kept.source) or "unknown",
        )
        for kept in found
    ]
    headings = ("name", "target", "MB", "whole", "source")
    click.echo(tables.aligned(headings, lines, words=("name", "target", "whole", "source")))
