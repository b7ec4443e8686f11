"""Mutated requests to a real server: each is answered or closed in time, and good requests between them say the same.

By hand:  PYTHONPATH=tests:tests/export:tests/runtime:tests/attacks python tests/fuzz/request_attempts.py --cases 5000
"""

from __future__ import annotations

import copy
import json
import math
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kept
from changes import HOSTILE_VALUES, nodes
from tiny_bundle import write_bundle

LIMIT_S = 10.0
START_S = 120.0
CHECK_EVERY = 25
"""A good request follows so many mutated ones."""

GOOD = {"prompt": "xA", "temperature": 0, "max_tokens": 3}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "prompt": "A", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["x"], "stream": False,
        "n": 1, "echo": False, "logit_bias": {}, "user": "u", "avg_bits": 4.0,
    },
    "/v1/chat/completions": {
        "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "A"}]}],
        "max_tokens": 2, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}, "tools": [],
        "response_format": {"type": "text"}, "chat_template_kwargs": {"add_generation_prompt": True},
        "reasoning_budget": 3,
    },
    "/v1/responses": {
        "instructions": "a", "max_output_tokens": 2, "temperature": 0, "stream": False,
        "text": {"format": {"type": "text"}},
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "A"}]},
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "a"}]},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "b"},
        ],
    },
    "/v1/messages": {
        "max_tokens": 2, "system": [{"type": "text", "text": "a"}], "stream": True, "stop_sequences": ["x"],
        "thinking": {"type": "enabled", "budget_tokens": 3}, "tool_choice": {"type": "none"},
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "A"}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "b"}]},
        ],
    },
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "A"}], "system": "a"},
    "/tokenize": {"content": "A", "add_special": True},
    "/detokenize": {"tokens": [68, 69]},
}  # fmt: skip
PATHS = ("/", "/health", "/metrics", "/v1/models", "/v1/budget", "/events", "/%00", "//", "/../etc/passwd", "*", "/v1")
METHODS = (b"GET", b"PUT", b"DELETE", b"OPTIONS", b"HEAD", b"PATCH", b"\x00", b"POST ", b"GETGETGETGET" * 20)


def _body(draw: random.Random) -> tuple[str, bytes]:
    """A path and a JSON body with one to three hostile values."""
    path = draw.choice(list(BODIES))
    document = copy.deepcopy(BODIES[path])
    for _ in range(draw.randint(1, 3)):
        places = nodes(document)
        if not places:
            break
        container, key = draw.choice(places)
        if draw.random() < 0.15:
            del container[key]
        else:
            container[key] = copy.deepcopy(draw.choice(HOSTILE_VALUES))
    return path, json.dumps(document).encode()


def _framed(path: str, body: bytes, *headers: bytes, method: bytes = b"POST") -> bytes:
    lines = [method + b" " + path.encode() + b" HTTP/1.1", b"Host: 127.0.0.1", b"Connection: close", *headers]
    return b"\r\n".join([*lines, b"Content-Length: %d" % len(body), b"", body])


def _values(draw: random.Random) -> bytes:
    return _framed(*_body(draw), b"Content-Type: application/json")


def _bytes(draw: random.Random) -> bytes:
    data = bytearray(_values(draw))
    for _ in range(draw.choice((1, 2, 8, 64))):
        data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data)


def _cut(draw: random.Random) -> bytes:
    data = _values(draw)
    return data[: draw.randrange(len(data))]


def _text(draw: random.Random) -> bytes:
    """A body that is no JSON object, or one that readers disagree on."""
    texts = (
        b"", b"[]", b"null", b'"a"', b"{" * 5000, b"[" * 100_000, b'{"prompt": "A", "prompt": "B"}', b'{"prompt": NaN}',
        b'{"prompt": "\\ud800"}', b"\xff\xfe{\x00}\x00", b'{"prompt": "' + b"A" * 200_000 + b'"}', b"9" * 5000,
        b'{"max_tokens": 1e400, "prompt": "A"}', b"\x00" * 1000,
    )  # fmt: skip
    return _framed(draw.choice(list(BODIES)), draw.choice(texts))


def _paths(draw: random.Random) -> bytes:
    path, method = draw.choice(PATHS), draw.choice((*METHODS, b"GET", b"GET"))
    # Events do not end: such a request asks for the headers alone.
    return _framed(path, b"", method=b"HEAD" if path == "/events" else method)


def _headers(draw: random.Random) -> bytes:
    """Headers that disagree, come twice, or are none."""
    headers = (
        b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked", b"Content-Length: 3", b"Content-Length: -1",
        b"Content-Length: 9" + b"9" * 40, b"Expect: 100-continue", b"Upgrade: websocket", b"Upgrade: h2c",
        b"Host: evil.example", b"Origin: https://evil.example", b"Authorization: Bearer " + b"x" * 5000,
        b"Content-Type: text/plain", b"Content-Encoding: gzip", b"X: " + b"y" * 70_000, b"a" * 300, b": ",
        b"\x00: \x00",
        b"X: \xff\xfe", b" folded", b"Range: bytes=0-1",
    )  # fmt: skip
    path, body = _body(draw)
    return _framed(path, body, *draw.sample(headers, draw.randint(1, 3)))


KINDS = {
    "values": _values, "bytes": _bytes, "cut": _cut, "text": _text, "paths": _paths, "headers": _headers,
}  # fmt: skip


@dataclass
class Report(kept.Sums):
    """Sums over all cases.

    statuses: answers by status, "closed" for a connection without one; slowest_s: of all answers; mb_first, mb_last:
    memory of the server after the first requests and at the end.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    mb_first: float = 0.0
    mb_last: float = 0.0


def ask(port: int, data: bytes, *, ends: bool) -> tuple[str, bytes, float]:
    """Send bytes and read to the end.

    Args:
        port: of the server.
        data: what is sent.
        ends: whether this side then closes its half, as a client that went away does.

    Returns:
        The status, or "closed", or "none" at the time limit; the answer; the seconds that it took.
    """
    started, answer = time.monotonic(), b""
    with socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S) as one:
        one.settimeout(LIMIT_S)
        try:
            one.sendall(data)
            if ends:
                one.shutdown(socket.SHUT_WR)
            while part := one.recv(1 << 16):
                answer += part
        except TimeoutError:
            return "none", answer, time.monotonic() - started
        except OSError:
            pass
    words = answer.split(b" ", 2)
    status = words[1].decode(errors="replace") if answer.startswith(b"HTTP/1.") and len(words) > 2 else "closed"
    return status, answer, time.monotonic() - started


@contextmanager
def serving(folder: Path) -> Iterator[tuple[int, int, Path]]:
    """``mbq serve`` of the tiny bundle: its port, its process and its log."""
    bundle, log = write_bundle(folder / "bundle"), folder / "log"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mbq_runtime.cli", "serve", str(bundle), "--port", str(port)]
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file, cwd=folder) as process:
        try:
            _wait_for(port, process)
            yield port, process.pid, log
        finally:
            process.terminate()
            process.wait(30)


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the server does not start")


def _memory_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1000


def run_cases(
    numbers: range, seed: int, report: Report, keep: Path | None = None, longest_s: float = math.inf
) -> Report:
    """Send requests and sum up the answers.

    Args:
        numbers: of the cases; kinds of change take turns.
        seed: with the number, decides all draws.
        report: the sums to add to.
        keep: a file that keeps the sums, or None.
        longest_s: no case starts after this time.
    """
    with tempfile.TemporaryDirectory(prefix="mbq-fuzz-requests-") as name, serving(Path(name)) as (port, pid, log):
        for path, body in BODIES.items():
            status, answer, _ = ask(port, _framed(path, json.dumps(body).encode()), ends=False)
            assert status == "200", answer

        def one(number: int) -> None:
            draw = random.Random(f"{seed} {number}")
            kind = list(KINDS)[number % len(KINDS)]
            data = KINDS[kind](draw)
            # What is cut off, or says a wrong length, is waited for as long as the client is there.
            status, answer, seconds = ask(port, data, ends=kind != "values")
            report.statuses[status] += 1
            report.slowest_s = max(report.slowest_s, seconds)
            if fault := _fault(kind, status, answer):
                report.fault(f"case {number} ({kind}): {fault}: {data[:300]!r} {answer[:300]!r}")
            if number % CHECK_EVERY == 0:
                _check(port, number, report)
                report.mb_last = _memory_mb(pid)
                report.mb_first = report.mb_first or (report.mb_last if number >= 20 * CHECK_EVERY else 0.0)

        kept.count(report, numbers, one, keep, longest_s)
        if "Traceback" in (said := log.read_text(errors="replace")):
            report.fault(f"the log has a traceback: {said[-2000:]}")
    return report


def _fault(kind: str, status: str, answer: bytes) -> str:
    if status == "none":
        return f"no end after {LIMIT_S:g} s"
    if status == "closed":
        return "" if kind != "values" else "no answer"
    if status[0] not in "1234":
        return f"status {status}"
    return "a traceback in the answer" if b"Traceback" in answer else ""


def _check(port: int, number: int, report: Report) -> None:
    status, answer, _ = ask(port, _framed("/v1/completions", json.dumps(GOOD).encode()), ends=False)
    if status != "200" or b'"BCD"' not in answer:
        report.fault(f"after case {number} a good request gets {status}: {answer[-300:]!r}")


if __name__ == "__main__":
    kept.main(__doc__, Report, run_cases)
