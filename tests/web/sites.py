"""A static file server for the page, which can do what servers do: no ranges, damaged bytes, silence."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BLANK = "/blank.html"
"""A page without anything, in which tests run modules of the page."""
EMPTY = b"<!doctype html><title>blank</title><link rel=icon href=data:,>"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


@dataclass
class Site:
    """What a server offers.

    folder: its files.
    url: where it listens.
    ranges: whether it answers requests for ranges.
    change: changes the bytes of an answer, given the path and the place of the first byte.
    gone: whether it ends each connection without an answer.
    most: bytes of weights that it sends in all; then the connection ends.  None for no end.
    asked: (path, Range header) of each request.
    """

    folder: Path
    url: str = ""
    ranges: bool = True
    change: Callable[[str, int, bytes], bytes] = lambda path, begin, content: content
    gone: bool = False
    most: int | None = None
    asked: list[tuple[str, str]] = field(default_factory=list)

    @property
    def weight_ranges(self) -> list[str]:
        """The ranges of weights that were asked for."""
        return [span for path, span in self.asked if path.endswith("weights.bin")]


@contextmanager
def serving(folder: Path) -> Iterator[Site]:
    """Serve a folder on a free port of this machine."""
    site = Site(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if site.gone:
                self.close_connection = True
                return
            path = self.path.partition("?")[0]
            span = self.headers.get("Range", "")
            site.asked.append((path, span))
            file = site.folder / (path.lstrip("/") or "index.html")
            if path != BLANK and not file.is_file():
                self.send_error(404)
                return
            content = EMPTY if path == BLANK else file.read_bytes()
            begin, end, status = 0, len(content), 200
            if site.ranges and (found := re.fullmatch(r"bytes=(\d+)-(\d+)", span)):
                begin, end, status = int(found[1]), min(int(found[2]) + 1, len(content)), 206
            sent = site.change(path, begin, content[begin:end])
            self.send_response(status)
            self.send_header("Content-Type", TYPES.get(file.suffix, "application/octet-stream"))
            self.send_header("Content-Length", str(end - begin))
            if status == 206:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
            self.end_headers()
            if path.endswith("weights.bin") and site.most is not None:
                sent = sent[: site.most]
                site.most -= len(sent)
            with suppress(ConnectionError):  # a page that was closed
                self.wfile.write(sent)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
