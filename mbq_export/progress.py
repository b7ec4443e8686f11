"""Who is told how far long work has come, and how a terminal shows it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

Report = Callable[[str, int, int], None]
"""Called with what is being done, how many steps are done and how many there are."""


def no_report(what: str, done: int, total: int) -> None:
    """The default: nobody is told."""


class Progress:
    """A Report: one bar per stage on a terminal, one line per stage elsewhere; always on stderr."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.stage = ""
        self.bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.quiet:
            return
        if not sys.stderr.isatty():
            if what != self.stage:
                click.echo(f"{what} ...", err=True)
            self.stage = what
            return
        if what != self.stage:
            from tqdm import tqdm

            self.__exit__()
            self.stage = what
            self.bar = tqdm(total=total, desc=what, file=sys.stderr, unit_scale=total > 1 << 20)
        self.bar.update(done - self.bar.n)
