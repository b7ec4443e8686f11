"""``mbq serve``"""

from __future__ import annotations

import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mbq_runtime.addresses import is_loopback
from mbq_runtime.errors import UsageError
from mbq_runtime.printable import printable

from .common import SWITCH_S, FiniteRange, coming_bundle_argument, engine_option, local_bundle, threads_option
from .steering import Steering, steered, steering_options
from .trust import note_code, trust_option

if TYPE_CHECKING:
    import uvicorn

    from mbq_runtime.bundle.facts import Budget
    from mbq_runtime.engine import Engine

_MOST_SLEEP_S = 10**9  # Python cannot wait for ten times as long
_CONTEXT = 4096  # a request without max_tokens allocates a cache of this many tokens


@click.command("serve")
@coming_bundle_argument
@click.argument("others", nargs=-1, metavar="[BUNDLE]...")
@click.option(
    "--models-mb",
    type=click.IntRange(1),
    metavar="N",
    help="Of several bundles, keep so many MB in memory; the ones used longest ago go.  [default: what is free]",
)
@click.option("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 for every network.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, help="Port to listen on; 0 for a free one.")
@click.option("--api-key", envvar="MBQ_API_KEY", help="Key that clients must send; better set as MBQ_API_KEY.")
@click.option(
    "--allow-origin", multiple=True, metavar="ORIGIN", help="Web page that may use the server, as https://chat.example."
)
@click.option("--any-model", is_flag=True, help="Answer requests for any model; else the name must be the bundle's.")
@click.option("--queue", type=click.IntRange(0), default=16, help="Requests that may wait; others get status 429.")
@click.option(
    "--context", type=int, help=f"Tokens of prompt and reply together.  [default: the bundle's, {_CONTEXT} at most]"
)
@click.option(
    "--cache-mb",
    type=click.IntRange(0),
    default=512,
    show_default=True,
    help="Memory for the contexts of earlier conversations, in MB; 0 for none.",
)
@click.option(
    "--sleep-idle-seconds",
    type=FiniteRange(0, _MOST_SLEEP_S, min_open=True),
    metavar="S",
    help="Free the model's memory after S seconds without a request.  [default: never]",
)
@click.option(
    "--app",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Bundle for WebGPU that browsers run at /app.  [default: the served one, if it is for WebGPU]",
)
@steering_options
@engine_option
@trust_option
@threads_option
def command(
    bundle: Path,
    follow: Callable[[Any], None],
    others: tuple[str, ...],
    models_mb: int | None,
    host: str,
    port: int,
    api_key: str | None,
    allow_origin: tuple[str, ...],
    any_model: bool,
    queue: int,
    context: int | None,
    cache_mb: int,
    sleep_idle_seconds: float | None,
    app: Path | None,
    engine: str | None,
    trust: bool,
    threads: int | None,
    **steering: Any,
) -> None:
    """Serve BUNDLE over HTTP with the APIs of OpenAI and Anthropic, and show the board on a page at /.

    A request may set avg_bits, or bound them by min_bits and max_bits.  Of several bundles, it names one.
    """
    try:
        import uvicorn

        from mbq_runtime.server.app import Server
        from mbq_runtime.server.connections import Listener
        from mbq_runtime.server.http import configure
        from mbq_runtime.server.models import Models, named
        from mbq_runtime.server.monitor_feed import MonitorFeed
    except ImportError as error:
        raise UsageError(f"{error.name} is missing: pip install 'mbq-export[serve]'") from None
    from mbq_runtime.bundle import manifest
    from mbq_runtime.engine import Engine
    from mbq_runtime.sensing.sensors import Sensors

    def load(folder: Path) -> Engine:
        most = min(manifest.read(folder).model.context_length, _CONTEXT)
        note_code(folder, trust=trust)
        return Engine.load(folder, threads=threads, engine=engine, context=most if context is None else context)

    def offered(loaded: Engine) -> Budget:
        low, high = followed.applied.within(loaded.manifest).bounds
        return replace(loaded.manifest.budget, min_bits=low, max_bits=high)

    followed = Steering(**steering)
    _check_access(api_key, allow_origin)
    with ExitStack() as stack:
        # Take the port before the model is loaded, so that a port in use is reported at once.
        listener = stack.enter_context(_listen(host, port))
        most_bytes = Sensors().read().available_memory_bytes if models_mb is None else models_mb * 10**6
        allow_http = click.get_current_context().params["allow_http"]
        folders = [bundle, *(local_bundle(other, allow_http=allow_http) for other in others)]
        rest = []
        for folder in folders[1:]:  # one after another in memory, so that a broken bundle is reported at once
            rest.append(load(folder))
            rest[-1].sleep()
        loaded = load(bundle)
        follow(loaded)
        engines = (loaded, *rest)
        offers = named([(path.absolute().name, one, offered(one)) for path, one in zip(folders, engines, strict=True)])
        names = ", ".join(printable(model.name) for model in offers)
        feed = MonitorFeed(names, lambda: runner.should_exit)
        models = stack.enter_context(
            Models(offers, lambda one: steered(one, followed, feed.add_event), most_bytes=most_bytes)
        )
        server = Server(
            models, feed, queue_limit=queue, cache_bytes=cache_mb * 10**6, host=host, api_key=api_key,
            origins=allow_origin, any_model=any_model, sleep_s=sleep_idle_seconds, app=app,
        )  # fmt: skip
        runner = uvicorn.Server(configure(server.app))
        address = f"http://{_shown(host)}:{listener.getsockname()[1]}"
        click.echo(f"{names}: {address}/v1 for clients, {address}/ for people; Ctrl-C ends it")
        if api_key is None and not is_loopback(host):
            click.echo(f"note: {host} can be reached by others, and there is no --api-key", err=True)
        sys.setswitchinterval(SWITCH_S)
        with _ended_by_hangup(runner):
            runner.run([Listener(fileno=listener.detach())])


@contextmanager
def _ended_by_hangup(runner: uvicorn.Server) -> Iterator[None]:
    """Let SIGHUP end the server as SIGTERM does, while the block runs.  uvicorn knows SIGINT and SIGTERM alone."""
    number = getattr(signal, "SIGHUP", None)  # Windows has none
    before = None if number is None else signal.getsignal(number)
    if number is None or before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False

    def end(*_: object) -> None:
        nonlocal came
        came = runner.should_exit = True

    signal.signal(number, end)
    try:
        yield
    finally:
        signal.signal(number, before)
    if came:
        signal.raise_signal(number)


def _check_access(api_key: str | None, origins: Sequence[str]) -> None:
    if api_key is not None and not api_key.strip():
        raise UsageError("--api-key is empty; leave it out, or give a key")
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise UsageError(
                f"--allow-origin {origin!r}: needed an origin such as https://chat.example, without a path"
            )


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except UnicodeError:  # a part of the name is empty or too long
        raise UsageError(f"cannot listen on {host} port {port} (no name of a machine); choose another") from None
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]  # the rest repeats the address
        raise UsageError(f"cannot listen on {host} port {port} ({reason}); choose another") from None


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
