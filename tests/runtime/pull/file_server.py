"""A server of plain files with HTTP ranges, which can be made slow, broken or hostile."""

from __future__ import annotations

import mimetypes
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

BLOCK_BYTES = 1 << 14

CHUNK_BYTES = 1 << 16
"""Size of a chunk in these tests."""
CHUNKS = 60
"""Chunks of the large file of the tests' bundle."""
WEIGHTS = "model.onnx.data"


@dataclass
class FileServer:
    """What the server does.  A test changes it while it runs.

    root: the folder that is served.
    ranges: whether it knows ranges; a server that does not sends whole files.
    asked: (path, begin, end) of each request, in order.
    headers: of each request, in order.
    answer: called with the handler, path and headers; it returns whether it has answered.
    change: called with path, place and bytes before they are sent; returns what is sent.
    sent: called with the bytes sent so far, after each block.
    """

    root: Path
    ranges: bool = True
    asked: list[tuple[str, int, int]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    answer: Callable[[BaseHTTPRequestHandler, str], bool] = lambda handler, path: False
    change: Callable[[str, int, bytes], bytes] = lambda path, begin, data: data
    sent: Callable[[int], Any] = lambda total: None
    sent_bytes: int = 0
    url: str = ""

    def bytes_of(self, name: str) -> int:
        """Bytes that were asked for of a file."""
        return sum(end - begin for path, begin, end in self.asked if path.endswith(f"/{name}"))


def _handler(server: FileServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0])
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            if server.answer(self, path):
                return
            place = server.root / (path.lstrip("/") or "index.html")
            if not place.is_file():
                self.send_error(404)
                return
            size = place.stat().st_size
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if server.ranges else None
            begin, end = (int(found[1]), min(int(found[2]) + 1, size)) if found else (0, size)
            server.asked.append((path, begin, end))
            self.send_response(206 if found else 200)
            if found:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
            self.send_header("Content-Type", mimetypes.guess_type(place)[0] or "application/octet-stream")
            self.send_header("Content-Length", str(end - begin))
            self.end_headers()
            with place.open("rb") as file:
                file.seek(begin)
                for at in range(begin, end, BLOCK_BYTES):
                    data = server.change(path, at, file.read(min(BLOCK_BYTES, end - at)))
                    self.wfile.write(data)
                    server.sent_bytes += len(data)
                    server.sent(server.sent_bytes)

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:  # the client has gone, or the test broke the connection
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextmanager
def serving(root: Path) -> Iterator[FileServer]:
    """Serve a folder on this machine while the block runs."""
    server = FileServer(root)
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(server)) as http:
        http.daemon_threads = True
        server.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
