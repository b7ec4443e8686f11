"""What the commands share: arguments, lists of numbers, and progress on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from mbq_runtime.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])
V = TypeVar("V")


def bundle_argument(function: F) -> F:
    return click.argument("bundle", type=click.Path(path_type=Path))(function)


def json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")(function)


def listed(option: str, text: str, kind: Callable[[str], V]) -> list[V]:
    """What ``option`` was given, with commas between.  Raises UsageError for a part that ``kind`` refuses."""
    try:
        return [kind(part.strip()) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text!r}: expected numbers such as 2,4,8") from None


def threads_option(function: F) -> F:
    return click.option("--threads", type=int, help="Processor threads.  [default: one per core]")(function)


def engine_option(function: F) -> F:
    help = "What runs the model, where the bundle has several.  [default: the bundle's choice]"
    return click.option("--engine", metavar="NAME", help=help)(function)


@contextmanager
def progress_line(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function for (done, total) that redraws one line on stderr; silent when that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return

    shown = -1

    def show(done: int, total: int) -> None:
        nonlocal shown
        percent = 100 * done // total if total else 100
        if percent != shown:
            shown = percent
            click.echo(f"\r{label}: {percent:3d} %", nl=False, err=True)

    try:
        yield show
    finally:
        click.echo("\r\033[K", nl=False, err=True)
