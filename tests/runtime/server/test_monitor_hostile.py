"""``mbq monitor`` against servers that are no mbq serve: one line, no traceback, no long wait, no much memory."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from mbq_runtime import cli
from mbq_runtime.commands import monitor

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
SAMPLE = {
    "time": 1e9, "avg_bits": 5.0, "avg_bits_used": None, "tokens_per_s": 3, "temp_c": None, "power_w": None,
    "energy_j_per_token": None, "waiting": 0, "reason": "no pressure",
}  # fmt: skip


def news(**changes: object) -> bytes:
    return b"data: " + json.dumps({"samples": [{**SAMPLE, **changes}], "events": []}).encode() + b"\n\n"


@contextmanager
def server(*pieces: bytes, pause_s: float = 0.0, repeat: int = 1) -> Iterator[str]:
    """A server that answers each connection with the pieces, and closes it."""

    def answer(sock: socket.socket) -> None:
        with sock, suppress(OSError):
            sock.recv(65536)
            for _ in range(repeat):
                for piece in pieces:
                    sock.sendall(piece)
                    if pause_s:
                        time.sleep(pause_s)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


HOSTILE: dict[str, tuple[bytes, ...]] = {
    "nothing": (b"",),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.2\r\n",),
    "a page": (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>",),
    "an empty page": (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",),
    "cut off": (b"HTTP/1.1 200 OK\r\nContent-Length: 600\r\n\r\n" + news()[:40],),
    "bad chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",),
    "a huge header": (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",),
    "many headers": (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n",),
    "status 500": (b"HTTP/1.1 500 \x1b[2J\r\nContent-Length: 0\r\n\r\n",),
    "a redirect": (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",),
    "a redirect to a file": (b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n",),
    "bad JSON": (STREAM, b"data: {\n\n"),
    "bytes": (STREAM, b"data: \xff\xfe\x1b[2J\n\n"),
    "deep JSON": (STREAM, b"data: " + b"[" * 100_000 + b"\n\n"),
    "a number": (STREAM, b"data: 7\n\n"),
    "null": (STREAM, b"data: null\n\n"),
    "no fields": (STREAM, b"data: {}\n\n"),
    "fields of the wrong kind": (STREAM, b'data: {"samples": {}, "events": 3}\n\n'),
    "an empty sample": (STREAM, b'data: {"samples": [{}], "events": []}\n\n'),
    "a sample that is text": (STREAM, b'data: {"samples": ["x"], "events": []}\n\n'),
    "an empty event": (STREAM, b'data: {"samples": [], "events": [{}]}\n\n'),
    "text for a number": (STREAM, news(avg_bits="5")),
    "a list for a number": (STREAM, news(temp_c=[1])),
    "a huge number": (STREAM, news(temp_c=10**400)),
    "a time far away": (STREAM, news(time=1e300)),
    "not a number": (STREAM, news(time=float("nan"))),
    "a number for a reason": (STREAM, news(reason=3)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_one_line(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with server(*HOSTILE[name]) as url:
        assert cli.main(["monitor", url]) == 2
    err = capsys.readouterr().err
    assert err.startswith("mbq: error: ")
    assert err.count("\n") == 1
    assert "\x1b" not in err
    assert len(err) < 500


def test_an_endless_line_is_not_kept(capsys: pytest.CaptureFixture[str]) -> None:
    with server(STREAM + b"data: ", *[b"x" * (1 << 20)] * 8) as url:
        assert cli.main(["monitor", url]) == 2
    assert "a line of more than" in capsys.readouterr().err


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\nX: ", STREAM + b"data: "], ids=["headers", "body"])
def test_a_slow_server(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, start: bytes) -> None:
    monkeypatch.setattr(monitor, "_TIMEOUT_S", 0.5)
    with server(start, *[b"x"] * 100, pause_s=0.1) as url:
        assert cli.main(["monitor", url]) == 2
    assert "0.5 s" in capsys.readouterr().err


def test_a_reason_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with server(STREAM, news(reason="\x1b[2Jheat\x07: 77 °C")) as url:
        assert cli.main(["monitor", url]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("\\x1b[2Jheat\\x07: 77 °C")


@pytest.mark.parametrize("url", ["board", "ftp://board", "http://[", "http://board:x", "", "file:///etc/passwd"])
def test_addresses_that_are_none(capsys: pytest.CaptureFixture[str], url: str) -> None:
    assert cli.main(["monitor", url]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("mbq: error: ")
