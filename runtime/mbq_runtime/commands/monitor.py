"""``mbq monitor``"""

from __future__ import annotations

import http.client
import json
import os
import queue
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import click

from mbq_runtime.errors import UsageError
from mbq_runtime.printable import printable

_TIMEOUT_S = 10.0
_PIECE_BYTES, _LINE_BYTES = 1 << 16, 1 << 21  # the first message has the samples of some minutes
_LARGEST = 1e11  # of a number that is shown; times are seconds since 1970
_UNKNOWN = "-"


@click.command("monitor")
@click.argument("url", default="http://127.0.0.1:8080", metavar="[URL]")
@click.option("--api-key", envvar="MBQ_API_KEY", help="The server's key; better set as MBQ_API_KEY.")
@click.option("--open", "in_browser", is_flag=True, help="Open the page in a browser instead.")
def command(url: str, api_key: str | None, in_browser: bool) -> None:
    """Watch a running mbq serve at URL: its budget, speed, heat and power, and why the budget changed.

    A browser shows the same at URL.  [default: http://127.0.0.1:8080]
    """
    url = url.rstrip("/")
    if in_browser:
        click.launch(url)
        return
    terminal = sys.stdout.isatty()
    if terminal:
        click.echo(f"{url}/ shows this in a browser; Ctrl-C ends")
    click.echo(_HEADING)
    for news in _follow(url, api_key):
        for event in news["events"]:
            change = f"{event['old']:.1f} -> {event['new']:.1f} bits: " if event["old"] != event["new"] else ""
            _show(f"{_clock(event['time'])}  {change}{printable(event['reason'])}", terminal, stays=True)
        for sample in news["samples"][-1:]:
            _show(_line(sample), terminal, stays=not terminal)


_COLUMNS: tuple[tuple[str, int, str, int], ...] = (
    ("bits", 5, "avg_bits", 1),
    ("used", 5, "avg_bits_used", 2),
    ("tokens/s", 9, "tokens_per_s", 1),
    ("°C", 6, "temp_c", 1),
    ("W", 6, "power_w", 1),
    ("J/token", 8, "energy_j_per_token", 2),
    ("waiting", 8, "waiting", 0),
)
"""heading, width, field of a sample, digits"""

_HEADING = f"{'time':<8}" + "".join(f" {name:>{width}}" for name, width, _, _ in _COLUMNS) + "  reason"


def _line(sample: dict[str, Any]) -> str:
    cells = "".join(
        f" {_UNKNOWN:>{width}}" if sample[field] is None else f" {sample[field]:>{width}.{digits}f}"
        for _, width, field, digits in _COLUMNS
    )
    return f"{_clock(sample['time'])}{cells}  {printable(sample['reason'])}"


def _clock(time_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(time_s))


def _show(text: str, terminal: bool, *, stays: bool) -> None:
    """Print a line.  On a terminal, the newest sample is redrawn in place below the lines that stay."""
    if terminal:
        width = os.get_terminal_size().columns
        text = "\r\x1b[K" + (text if stays else text[: width - 1])
    click.echo(text, nl=stays)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could send the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _follow(url: str, api_key: str | None) -> Iterator[dict[str, Any]]:
    """The checked messages of a server.  Raises UsageError when it cannot be reached, or is not mbq serve."""
    seen = False
    try:
        with _open(f"{url}/live", api_key) as answer:
            for line in _lines(answer):
                if line.startswith(b"data: "):
                    yield _checked(json.loads(line[6:]))
                    seen = True
    except urllib.error.HTTPError as error:
        hint = "give the server's --api-key" if error.code == 401 else "is it mbq serve?"
        raise UsageError(f"{url}: refused with status {error.code}; {hint}") from None
    except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
        reason = printable(str(error))[:200] or type(error).__name__
        raise UsageError(f"{url}: no server there ({reason}); start one with mbq serve") from None
    if not seen:
        raise UsageError(f"{url}: no server there (it sent no figures); start one with mbq serve")


def _open(address: str, api_key: str | None) -> Any:
    """The open stream of a server.  A thread opens it, because a server can send its headers byte by byte."""
    try:
        request = urllib.request.Request(address, headers={"Authorization": f"Bearer {api_key}"} if api_key else {})
    except ValueError:
        raise UsageError(f"{address}: needed an address such as http://127.0.0.1:8080") from None
    # A board is not behind a proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)
    found: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def call() -> None:
        try:
            found.put(opener.open(request, timeout=_TIMEOUT_S))
        except Exception as error:  # raised again in the thread that waits
            found.put(error)

    threading.Thread(target=call, name="mbq-monitor", daemon=True).start()
    try:
        answer = found.get(timeout=_TIMEOUT_S)
    except queue.Empty:
        raise TimeoutError(f"no answer in {_TIMEOUT_S:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _lines(answer: Any) -> Iterator[bytes]:
    """The lines of a stream.  Raises ValueError for a line that is too long, or takes too long."""
    rest, begun_s = b"", time.monotonic()
    while piece := answer.read1(_PIECE_BYTES):
        *lines, rest = (rest + piece).split(b"\n")
        if lines:
            begun_s = time.monotonic()
        yield from lines
        if len(rest) > _LINE_BYTES:
            raise ValueError(f"a line of more than {_LINE_BYTES} bytes")
        if rest and time.monotonic() - begun_s > _TIMEOUT_S:
            raise ValueError(f"a line took more than {_TIMEOUT_S:g} s")


def _checked(news: Any) -> dict[str, Any]:
    """A message of the server.  Raises ValueError when it is not one."""
    if not isinstance(news, dict) or not all(isinstance(news.get(name), list) for name in ("events", "samples")):
        raise ValueError("its messages are not those of mbq serve")
    samples = {"time": False, "reason": None, **{field: True for _, _, field, _ in _COLUMNS}}
    events = {"time": False, "old": False, "new": False, "reason": None}
    for entries, fields in ((news["samples"], samples), (news["events"], events)):
        for entry in entries:
            for field, optional in fields.items():
                if not isinstance(entry, dict) or not _is_valid(entry.get(field), optional):
                    raise ValueError(f"its messages are not those of mbq serve: no valid {field}")
    return news


def _is_valid(value: Any, optional: bool | None) -> bool:
    """Whether a value is a text (``optional`` None), or a number that can be shown (or null, if ``optional``)."""
    if optional is None:
        return isinstance(value, str)
    if value is None:
        return optional
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST
