"""Common parts of the commands: arguments, lists of numbers, and the progress line."""

from __future__ import annotations

import functools
import io
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO, TypeVar, cast

import click

from mbq_runtime.errors import UsageError
from mbq_runtime.printable import printable
from mbq_runtime.progress import Progress

if TYPE_CHECKING:
    from mbq_runtime.pull import Pulled, Source

F = TypeVar("F", bound=Callable[..., Any])
V = TypeVar("V")

SWITCH_S = 1e-4
"""``sys.setswitchinterval`` of a command whose other threads must run beside an engine.

A pass of onnxruntime-genai holds the interpreter's lock.  Between two passes, a thread gets the lock only after it has
waited this long.  Python's default of 5 ms is longer than many passes: the other threads would get no turn.
"""


class FiniteRange(click.FloatRange):
    """A range of numbers.  click's own takes NaN, and infinity where the range has no upper end."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number.

        Args:
            value: what the user gave.
            param: the option.
            ctx: the command.
        """
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not in the range {self._describe_range()}.", param, ctx)
        return number


def bundle_argument(function: F) -> F:
    """Add the argument BUNDLE, a folder or a source to pull from, and the option --allow-http.

    Args:
        function: a command; it gets ``bundle``, the Path of a folder.
    """

    @functools.wraps(function)
    def command(*, bundle: str, allow_http: bool, **options: Any) -> Any:
        return function(bundle=local_bundle(bundle, allow_http=allow_http), **options)

    return cast(F, click.argument("bundle")(allow_http_option(command)))


def coming_bundle_argument(function: F) -> F:
    """Add the argument BUNDLE and the option --allow-http to a command that can run a bundle while it is pulled.

    Args:
        function: a command; it gets ``bundle``, a context that gives ``Coming``, and ``engine`` of ``engine_option``.
    """

    @functools.wraps(function)
    def command(*, bundle: str, allow_http: bool, engine: str | None, **options: Any) -> Any:
        with coming_bundle(bundle, allow_http=allow_http, engine=engine) as coming:
            return function(bundle=coming.folder, follow=coming.follow, engine=engine, **options)

    return cast(F, click.argument("bundle")(allow_http_option(command)))


class Coming(NamedTuple):
    """A bundle that can run.

    folder: of the bundle, or of its unfinished files.
    follow: called with the engine that has loaded it, before its first reply.
    """

    folder: Path
    follow: Callable[[Any], None]


@contextmanager
def coming_bundle(text: str, *, allow_http: bool, engine: str | None) -> Iterator[Coming]:
    """A bundle as soon as it can run.  The rest of a source comes while the block runs.

    Args:
        text: a folder, or a source such as hf:OWNER/NAME.
        allow_http: whether an http server may be another machine.
        engine: kind of engine that will run it; None for the bundle's default.

    Yields:
        The bundle.

    Raises:
        MbqError: as ``mbq_runtime.pull.pull``.
    """
    from mbq_runtime.pull.sources import Source, is_source

    if not is_source(text):
        yield Coming(Path(text), lambda loaded: None)
        return
    from mbq_runtime.pull import Incoming, place_of

    source = Source.of(text, allow_http=allow_http)
    if place_of(source).exists():
        yield Coming(place_of(source), lambda loaded: None)
        return
    with progress_line(f"pulling {source.text}") as progress:
        shown: list[Progress] = [progress]
        incoming = Incoming(source, allow_http=allow_http, progress=lambda done, total: shown[0](done, total))
        _import_packages(engine)
        folder = incoming.folder(engine)
        shown[0] = lambda done, total: None
    if incoming.whole is not None:
        _say_pulled(incoming.whole, source)
    else:
        sys.setswitchinterval(SWITCH_S)
        megabytes = incoming.done_bytes / 1e6
        click.echo(
            f"note: it starts with {megabytes:.1f} MB at the lowest budget, which rises as the rest comes", err=True
        )
    yield Coming(folder, incoming.follow)
    if incoming.error is not None:
        click.echo(f"note: the rest did not come: {printable(str(incoming.error))}", err=True)
    elif incoming.whole is None:
        click.echo("note: the rest has not come yet; the same command goes on from here", err=True)


def _import_packages(engine: str | None) -> None:
    """Import what an engine needs, while its bundle comes.  Later each second would be that of a person who waits."""
    import mbq_runtime.engine  # noqa: F401
    from mbq_runtime.engine.imports import import_engine

    if engine in (None, "onnx"):
        with suppress(UsageError):  # whoever loads the engine says what is missing
            import_engine("onnxruntime_genai")


def allow_http_option(function: F) -> F:
    """Add the option --allow-http.

    Args:
        function: a command; it gets ``allow_http``, a bool.
    """
    help = "Pull over http, which is not encrypted, from another machine too."
    return click.option("--allow-http", is_flag=True, help=help)(function)


def key_option(function: F) -> F:
    """Add the option --key.

    Args:
        function: a command; it gets ``key``, a Path or None.
    """
    help = "Public Ed25519 key of the bundle's maker: refuse a bundle that it has not signed."
    return click.option("--key", type=click.Path(path_type=Path), help=help)(function)


def local_bundle(text: str, *, allow_http: bool) -> Path:
    """The folder of a bundle.  A source is pulled into the cache folder, unless its bundle is there.

    Args:
        text: a folder, or a source such as hf:OWNER/NAME.
        allow_http: whether an http server may be another machine.

    Raises:
        UsageError: the source may not be used.
        BundleError: it has no bundle, or a broken one.
    """
    from mbq_runtime.pull.sources import Source, is_source

    if not is_source(text):
        return Path(text)
    from mbq_runtime.pull import place_of

    source = Source.of(text, allow_http=allow_http)
    folder = place_of(source)
    return folder if folder.exists() else pull_bundle(source, None, allow_http=allow_http).folder


def pull_bundle(
    source: Source,
    folder: Path | None,
    *,
    allow_http: bool,
    key: Path | None = None,
    max_bits: float | None = None,
) -> Pulled:
    """Pull a bundle, and say on stderr what was done.

    Args:
        source: of the bundle.
        folder: where it goes; None for the cache folder.
        allow_http: whether an http server may be another machine.
        key: file of the maker's public key; None: the bundle need not be signed.
        max_bits: fetch only the depths of at most so many bits per weight; None for all.

    Raises:
        MbqError: as ``mbq_runtime.pull.pull``.
    """
    from mbq_runtime.pull import pull

    with progress_line(f"pulling {source.text}") as progress:
        done = pull(source, folder, allow_http=allow_http, key=key, max_bits=max_bits, progress=progress)
    _say_pulled(done, source)
    return done


def _say_pulled(done: Pulled, source: Source) -> None:
    size, fetched = done.manifest.total_bytes / 1e6, done.fetched_bytes / 1e6
    text = f"{done.folder}: {size:.1f} MB in {len(done.manifest.files)} files, all as the manifest says"
    click.echo(f"{printable(text)}; {fetched:.1f} MB came from {printable(source.text)}", err=True)


def json_option(function: F) -> F:
    """Add the option --json.

    Args:
        function: a command; it gets ``as_json``, a bool.
    """
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")(function)


def text_stdin() -> TextIO:
    """Stdin as text in UTF-8.  Other bytes become half characters, as in arguments: the engine refuses them."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    return sys.stdin


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


def choice_options(function: F) -> F:
    """Add options of the choice of tokens that have the same default in every command.

    Args:
        function: a command; it gets ``top_k``, ``min_p``, ``repetition_penalty``, ``seed`` and ``reasoning_budget``.
    """
    for option in reversed((
        click.option("--top-k", type=int, default=0, help="Choose among this many likeliest tokens; 0: all."),
        click.option("--min-p", type=float, default=0.0, help="Leave out tokens below this share of the likeliest."),
        click.option("--repetition-penalty", type=float, default=1.0, help="Above 1: fewer repetitions; 1: no change."),
        click.option("--seed", type=int, help="Repeat a varied reply."),
        click.option("--reasoning-budget", type=int, help="Most tokens of the model's reasoning.  [default: no limit]"),
    )):  # fmt: skip
        function = option(function)
    return function


def prompt_cache_option(function: F) -> F:
    """Add the option --prompt-cache.

    Args:
        function: a command; it gets ``prompt_cache``, a Path or None.
    """
    help = "Keep what was read in this file, and begin with what is in it."
    return click.option("--prompt-cache", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help=help)(
        function
    )


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
