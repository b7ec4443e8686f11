"""``mbq monitor``"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import click

from mbq_runtime.errors import UsageError

_TIMEOUT_S = 10.0
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
            _show(f"{_clock(event['time'])}  {change}{event['reason']}", terminal, stays=True)
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
    return f"{_clock(sample['time'])}{cells}  {sample['reason']}"


def _clock(time_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(time_s))


def _show(text: str, terminal: bool, *, stays: bool) -> None:
    """Print a line.  On a terminal, the newest sample is redrawn in place below the lines that stay."""
    if terminal:
        width = os.get_terminal_size().columns
        text = "\r\x1b[K" + (text if stays else text[: width - 1])
    click.echo(text, nl=stays)


def _follow(url: str, api_key: str | None) -> Iterator[dict[str, Any]]:
    """The server's messages as they come.  Raises UsageError when it cannot be reached."""
    request = urllib.request.Request(f"{url}/live", headers={"Authorization": f"Bearer {api_key}"} if api_key else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a board is not behind a proxy
    try:
        with opener.open(request, timeout=_TIMEOUT_S) as answer:
            for line in answer:
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])
    except urllib.error.HTTPError as error:
        hint = "give the server's --api-key" if error.code == 401 else "is it mbq serve?"
        raise UsageError(f"{url}: refused with status {error.code}; {hint}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{url}: no server there ({error}); start one with mbq serve") from None
