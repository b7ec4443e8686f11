"""Common parts of the commands: arguments, lists of numbers, and the progress line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from mbq_runtime.errors import UsageError
from mbq_runtime.progress import Progress

F = TypeVar("F", bound=Callable[..., Any])
V = TypeVar("V")


def bundle_argument(function: F) -> F:
    """Add the argument BUNDLE.

    Args:
        function: a command; it gets ``bundle``, a Path.
    """
    return click.argument("bundle", type=click.Path(path_type=Path))(function)


def json_option(function: F) -> F:
    """Add the option --json.

    Args:
        function: a command; it gets ``as_json``, a bool.
    """
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")(function)


def listed(option: str, text: str, kind: Callable[[str], V]) -> list[V]:
    """Read a list of numbers with commas between.

    Args:
        option: name of the option, for the message.
        text: such as "2,4,8".
        kind: makes a value of each part; raises ValueError for a bad one.

    Raises:
        UsageError: a part is bad.

    >>> listed("--bits", "2, 4.5", float)
    [2.0, 4.5]
    """
    try:
        return [kind(part.strip()) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text!r}: expected numbers such as 2,4,8") from None


def threads_option(function: F) -> F:
    """Add the option --threads.

    Args:
        function: a command; it gets ``threads``, an int or None.
    """
    return click.option("--threads", type=int, help="Processor threads.  [default: one per big core]")(function)


def engine_option(function: F) -> F:
    """Add the option --engine.

    Args:
        function: a command; it gets ``engine``, a str or None.
    """
    help = "Kind of engine that runs the model.  [default: the bundle's]"
    return click.option("--engine", metavar="NAME", help=help)(function)


def template_kwargs_option(function: F) -> F:
    """Add the option --chat-template-kwargs.

    Args:
        function: a command; it gets ``template_kwargs``, a dict or None.
    """

    def read(context: click.Context, parameter: click.Parameter, value: str | None) -> dict[str, Any] | None:
        try:
            given = None if value is None else json.loads(value)
        except (ValueError, RecursionError):
            given = ()
        if given is not None and not isinstance(given, dict):
            raise UsageError(
                f"--chat-template-kwargs {value!r}: expected a JSON object such as '{{\"enable_thinking\": false}}'"
            )
        return given

    return click.option(
        "--chat-template-kwargs", "template_kwargs", metavar="JSON", callback=read,
        help="Variables of the chat template, such as '{\"enable_thinking\": false}'.",
    )(function)  # fmt: skip


@contextmanager
def progress_line(label: str) -> Iterator[Progress]:
    """Show progress in one line on stderr, which is removed at the end.  Shows nothing when stderr is no terminal.

    Args:
        label: start of the line: what is being done.

    Yields:
        A function that redraws the line.
    """
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
