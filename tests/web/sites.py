"""What a file server does to the page: it breaks off, it is gone, it damages bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import file_server
from file_server import FileServer

BLANK = "/blank.html"
"""A page without anything, in which tests run modules of the page."""
WEIGHTS = "weights.bin"


@contextmanager
def serving(folder: Path) -> Iterator[FileServer]:
    """Serve a folder, and the page ``BLANK``, which is written to it."""
    page = "<!doctype html><title>blank</title><link rel=icon href=data:,>"
    (folder / BLANK.lstrip("/")).write_text(page, encoding="utf-8")
    with file_server.serving(folder) as site:
        yield site


def weight_ranges(site: FileServer) -> list[tuple[int, int]]:
    """(begin, end) of each request for weights."""
    return [(begin, end) for path, begin, end in site.asked if path.endswith(WEIGHTS)]


def unchanged(path: str, begin: int, data: bytes) -> bytes:
    """For ``FileServer.change``: what the file has."""
    return data


def damaged(path: str, begin: int, data: bytes) -> bytes:
    """For ``FileServer.change``: other bytes of weights."""
    return data[::-1] if path.endswith(WEIGHTS) else data


def ends_after(most: int) -> Callable[[str, int, bytes], bytes]:
    """For ``FileServer.change``: so many bytes of weights in all, and then each connection ends."""
    left = most

    def change(path: str, begin: int, data: bytes) -> bytes:
        nonlocal left
        if not path.endswith(WEIGHTS):
            return data
        if not left:
            raise ConnectionAbortedError
        data = data[:left]
        left -= len(data)
        return data

    return change


def gone(handler: BaseHTTPRequestHandler, path: str) -> bool:
    """For ``FileServer.answer``: each connection ends without an answer."""
    handler.close_connection = True
    return True


def there(handler: BaseHTTPRequestHandler, path: str) -> bool:
    """For ``FileServer.answer``: files are sent."""
    return False
