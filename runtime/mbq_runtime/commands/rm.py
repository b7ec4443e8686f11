"""``mbq rm``"""

from __future__ import annotations

import click

from mbq_runtime.printable import printable


@click.command("rm")
@click.argument("name")
def command(name: str) -> None:
    """Remove the bundle NAME from the cache folder.  NAME is a name of mbq list, or the bundle's source."""
    from mbq_runtime.pull import remove

    for kept in remove(name):
        click.echo(printable(f"removed {kept.folder}"))
