"""A bundle on a web server of plain files: ranges of files over HTTP."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any
from urllib.parse import quote
from weakref import WeakSet

import httpx2

from mbq_runtime.addresses import may_be_asked
from mbq_runtime.bundle.listed_files import FileEntry
from mbq_runtime.errors import BundleError
from mbq_runtime.version import installed_version

from .files import TOKEN_VARIABLE, Files, InterruptedFetchError

_MOST_REDIRECTS = 5
_TIMEOUT = httpx2.Timeout(30, connect=15)  # seconds without a byte
_ANSWER_S = 60.0
"""An answer must begin in this time, redirects included."""
_LOWEST_BYTES_PER_S, _SLOW_S = 1000, 60.0
"""A source that sends fewer bytes than this for so long is given up.  A timeout ends with each byte that comes."""
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_BUSY = (408, 425, 429, 500, 502, 503, 504)


class HttpFiles(Files):
    """A bundle in a folder on a server, see ``files.Files``.  It is used as a context.

    address: URL of the folder.
    headers: sent with each request; a token is not sent to another server after a redirect.
    allow_http: whether an http server may be another machine.
    """

    def __init__(self, address: str, headers: dict[str, str], *, allow_http: bool = False) -> None:
        self._address, self._allow_http = address, allow_http
        fixed = {"User-Agent": f"mbq/{installed_version()}", "Accept-Encoding": "identity"}
        self._sockets = WeakSet[socket.socket]()
        self._client = httpx2.Client(headers={**headers, **fixed}, timeout=_TIMEOUT, follow_redirects=False)

    def __enter__(self) -> HttpFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def small(self, name: str, most_bytes: int) -> bytes | None:
        with self._answer(name, {}) as (url, response):
            if response.status_code in (404, 410):
                return None
            _check_status(url, response, 200)
            content = b""
            for block in _raw(url, response):
                content += block
                if len(content) > most_bytes:
                    raise BundleError(f"{url}: larger than {most_bytes} bytes, the most for this file; ask its owner")
            return content

    @contextmanager
    def blocks(self, entry: FileEntry, begin: int, end: int) -> Iterator[Iterator[bytes]]:
        with self._answer(entry.name, {"Range": f"bytes={begin}-{end - 1}"}) as (url, response):
            if response.status_code == 416:
                raise BundleError(f"{url}: ends before byte {end}, needed {entry.size} bytes as the manifest says")
            _check_status(url, response, 206, 200)
            # A server without ranges sends the whole file.
            skip = begin if response.status_code == 200 else 0
            _check_size(url, response, entry.size, begin, end)
            yield _cut(_raw(url, response), skip, end - begin)

    @contextmanager
    def _answer(self, name: str, headers: dict[str, str]) -> Iterator[tuple[str, httpx2.Response]]:
        """URL and response, after redirects.  Errors of the network become ``InterruptedFetchError``."""
        url = f"{self._address}/{quote(name)}"
        try:
            with self._limited(url):
                asked = self._client.build_request("GET", url, headers=headers, extensions={"trace": self._note})
                response = self._send(asked)
            try:
                yield url, response
            finally:
                response.close()
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, UnicodeError) as error:  # the last for names of hosts
            raise BundleError(f"{url}: {error}; check the address") from None
        except httpx2.TransportError as error:
            raise InterruptedFetchError(f"{url}: {str(error) or type(error).__name__}") from None

    @contextmanager
    def _limited(self, url: str) -> Iterator[None]:
        """End the connection if an answer has not begun in time.  A timeout ends with each byte of its headers."""
        late = threading.Event()

        def end() -> None:
            late.set()
            for connection in list(self._sockets):
                with suppress(OSError):  # it is closed
                    connection.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(_ANSWER_S, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        except httpx2.TransportError:
            if late.is_set():
                raise InterruptedFetchError(f"{url}: no answer in {_ANSWER_S:.0f} s") from None
            raise
        finally:
            timer.cancel()

    def _note(self, event: str, facts: dict[str, Any]) -> None:
        """Keep the sockets of all connections."""
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            self._sockets.add(facts["return_value"].get_extra_info("socket"))

    def _send(self, request: httpx2.Request) -> httpx2.Response:
        for _ in range(_MOST_REDIRECTS + 1):
            response = self._client.send(request, stream=True)
            if response.next_request is None:
                return response
            response.close()
            target = response.next_request.url
            if target.scheme != request.url.scheme or not may_be_asked(str(target), self._allow_http):
                raise BundleError(
                    f"{request.url}: the server redirects to {target.scheme}://{target.host}, needed "
                    f"{request.url.scheme}; give the address that it redirects to, if you trust it"
                )
            request = response.next_request
        raise BundleError(f"{request.url}: more than {_MOST_REDIRECTS} redirects; ask the owner of the server")


def _check_status(url: str, response: httpx2.Response, *needed: int) -> None:
    status = response.status_code
    if status in _BUSY:
        raise InterruptedFetchError(f"{url}: status {status}")
    if status in (401, 403):
        raise BundleError(
            f"{url}: status {status}, it is private; set {TOKEN_VARIABLE} (HF_TOKEN for hf:) to a token that may read "
            "it"
        )
    if status not in needed:
        raise BundleError(f"{url}: status {status}, needed {needed[0]}; check the address")
    coding = response.headers.get("Content-Encoding", "identity")
    if coding != "identity":
        raise BundleError(f"{url}: sent with coding {coding[:20]!r}, needed none; the server must send plain files")


def _check_size(url: str, response: httpx2.Response, size: int, begin: int, end: int) -> None:
    """The server's file has the size that the manifest says, and the answer is the range that was asked for."""
    if response.status_code == 200:
        seen = response.headers.get("Content-Length", str(size))
        if seen != str(size):
            raise BundleError(f"{url}: {seen[:20]} bytes long, needed {size} as the manifest says; ask its owner")
        return
    text = response.headers.get("Content-Range", "")
    found = _RANGE.fullmatch(text)
    if not found or tuple(map(int, found.groups())) != (begin, end - 1, size):
        raise BundleError(
            f"{url}: the server sends {text[:60] or 'no Content-Range'!r}, needed 'bytes {begin}-{end - 1}/{size}' as "
            "the manifest says; ask its owner"
        )


def _raw(url: str, response: httpx2.Response) -> Iterator[bytes]:
    """Blocks as they come.  Only the time of waiting for them counts for the lowest rate."""
    blocks = response.iter_raw()
    waited_s, came = 0.0, 0
    while True:
        begin_s = time.monotonic()
        block = next(blocks, None)
        waited_s += time.monotonic() - begin_s
        if block is None:
            return
        came += len(block)
        if waited_s >= _SLOW_S:
            if came < _LOWEST_BYTES_PER_S * waited_s:
                raise InterruptedFetchError(f"{url}: slower than {_LOWEST_BYTES_PER_S} bytes/s for {waited_s:.0f} s")
            waited_s, came = 0.0, 0
        yield block


def _cut(blocks: Iterator[bytes], skip: int, count: int) -> Iterator[bytes]:
    """``count`` bytes after the first ``skip`` ones.  What a server sends after them is not read."""
    for block in blocks:
        part = block[skip:] if skip else block
        skip = max(skip - len(block), 0)
        if part:
            yield part[:count]
            count -= len(part)
        if count <= 0:
            return
