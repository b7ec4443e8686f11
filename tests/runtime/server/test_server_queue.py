"""Many clients, some slow and some that leave: each one gets its own answer or an error, and no task is left over."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import Running, serve, wait_for
from tiny_bundle import REPLY

from mbq_runtime import Engine
from mbq_runtime.server import replies

CLIENTS, REQUESTS_EACH, QUEUE = 50, 6, 8


def completion(running: Running, *, stream: bool = False, **fields: Any) -> http.client.HTTPConnection:
    """Send a request; ``getresponse`` waits for the answer."""
    body = {"prompt": "xA", "temperature": 0, "max_tokens": 40, "stream": stream, **fields}
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection


def text(connection: http.client.HTTPConnection) -> str:
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    found = json.loads(answer.read())["choices"][0]["text"]
    connection.close()
    return str(found)


@pytest.fixture
def idle(running: Running) -> Iterator[int]:
    """Number of tasks of the idle server.  After the test it must be the same, and no thread is left over."""
    wait_for(lambda: running.tasks > 0)
    tasks, threads = running.tasks, threading.active_count()
    yield tasks
    wait_for(lambda: running.settled(tasks), "coming to rest")
    wait_for(lambda: threading.active_count() <= threads, "threads ending")
    assert text(completion(running, max_tokens=3)) == "BCD"


@pytest.mark.heavy
def test_fifty_clients_each_get_their_own_answer_or_a_refusal(engine: Engine) -> None:
    # "@" and "G" are metered by the same.
    prompts = [f"x{chr(byte)}" for byte in range(ord("!"), ord("!") + CLIENTS + 1) if chr(byte) != "@"]

    async def all_of_them(url: str, alone: dict[str, str]) -> Counter[str]:
        counts: Counter[str] = Counter()
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)

        async def one(number: int) -> None:
            for turn in range(REQUESTS_EACH):
                prompt = prompts[(number + turn) % CLIENTS]
                options: dict[str, Any] = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 24}
                try:
                    if (number + turn) % 2:
                        stream = await client.completions.create(**options, stream=True)
                        found = "".join([chunk.choices[0].text async for chunk in stream])
                    else:
                        found = (await client.completions.create(**options)).choices[0].text
                except openai.RateLimitError as error:
                    counts["refused" if error.code == "queue_full" else "refused oddly"] += 1
                    await asyncio.sleep(0.02)
                else:
                    counts["right" if found == alone[prompt] else "mixed up"] += 1

        await asyncio.gather(*(one(number) for number in range(CLIENTS)))
        await client.close()
        return counts

    with serve(engine, queue_limit=QUEUE) as running:
        idle_tasks = running.tasks
        alone = {prompt: text(completion(running, prompt=prompt, max_tokens=24)) for prompt in prompts}
        assert len(set(alone.values())) == CLIENTS
        before = running.server.worker.tokens
        counts = asyncio.run(all_of_them(running.url, alone))
        assert counts["mixed up"] == 0
        assert counts["right"] + counts["refused"] == CLIENTS * REQUESTS_EACH
        assert counts["right"] > 2 * QUEUE
        assert counts["refused"] > 0
        assert running.server.worker.tokens - before <= 24 * counts["right"]  # refusals cost the engine nothing
        wait_for(lambda: running.settled(idle_tasks), "coming to rest")


def test_the_queue_holds_what_it_says(slow_engine: Engine) -> None:
    with serve(slow_engine, queue_limit=2) as running:
        requests = [completion(running, max_tokens=10)]
        wait_for(lambda: running.server.worker.running)
        for waiting in (1, 2):
            requests.append(completion(running, max_tokens=10))
            wait_for(lambda waiting=waiting: running.server.worker.waiting == waiting)  # type: ignore[misc]
        refused = completion(running).getresponse()
        assert refused.status == 429
        assert refused.headers["Retry-After"] == "1"
        error = json.loads(refused.read())["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert [text(request) for request in requests] == ["BCDEFGABCD"] * 3
        assert text(completion(running, max_tokens=3)) == "BCD"


def test_without_a_queue_one_request_is_served_at_a_time(slow_engine: Engine) -> None:
    with serve(slow_engine, queue_limit=0) as running:
        first = completion(running, max_tokens=10)
        wait_for(lambda: running.server.worker.running)
        assert completion(running).getresponse().status == 429
        assert text(first) == "BCDEFGABCD"
        wait_for(lambda: not running.server.worker.running)
        assert text(completion(running, max_tokens=3)) == "BCD"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_reply(slow_engine: Engine, running: Running, idle: int, stream: bool) -> None:
    connection = completion(running, stream=stream, max_tokens=90)
    wait_for(lambda: running.server.worker.tokens >= 3)
    connection.close()
    wait_for(lambda: running.settled(idle), "stopping")
    assert running.server.worker.tokens < 40
    left = 'mbq_requests_total{path="/v1/completions",status="%s"} 1.0' % ("200" if stream else "499")
    assert left in running.server.metrics.text().decode()


def test_a_client_that_leaves_the_queue_is_forgotten(slow_engine: Engine, running: Running, idle: int) -> None:
    first = completion(running, max_tokens=10)
    wait_for(lambda: running.server.worker.running)
    second = completion(running, max_tokens=90)
    wait_for(lambda: running.server.worker.waiting == 1)
    second.close()
    wait_for(lambda: running.server.worker.waiting == 0)
    assert running.server.worker.running
    assert text(first) == "BCDEFGABCD"
    wait_for(lambda: running.settled(idle))
    assert running.server.worker.tokens == 10


def test_a_slow_reader_delays_nobody_and_loses_nothing(running: Running, idle: int) -> None:
    slow = completion(running, stream=True, max_tokens=90)
    wait_for(lambda: running.server.worker.tokens == 90 and not running.server.worker.running)
    assert text(completion(running, max_tokens=3)) == "BCD"
    answer, pieces = slow.getresponse(), b""
    while piece := answer.read(7):
        pieces += piece
    chunks = [json.loads(line[6:]) for line in pieces.decode().split("\n\n") if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == ("ABCDEFG" * 13)[1:91]
    slow.close()


def test_clients_that_never_read_and_watchers_that_leave_cost_nothing(running: Running, idle: int) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    deaf = []
    for path in (b"POST /v1/completions", b"GET /live"):
        for _ in range(10):
            sock = socket.create_connection(("127.0.0.1", running.port), timeout=20)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            body = b'{"prompt": "xA", "stream": true, "max_tokens": 90}' if path.startswith(b"POST") else b""
            sock.sendall(path + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            deaf.append(sock)
    wait_for(lambda: running.server.worker.tokens >= 90)
    for sock in deaf:
        sock.close()
    wait_for(lambda: running.settled(idle), "coming to rest")
    wait_for(lambda: len(os.listdir("/proc/self/fd")) <= descriptors, "descriptors closing")


def test_a_client_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "_STALL_S", 0.05)
    closed = []

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"data"
        finally:
            closed.append(True)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            sent.append(message)
            if len(sent) == 3:
                await asyncio.Event().wait()  # the client's window is full, for ever

    sent: list[Any] = []
    asyncio.run(asyncio.wait_for(replies.send_events(send, events()), 10))
    assert closed == [True]
    assert all(message["more_body"] for message in sent)


def test_stopping_the_server_ends_replies_and_streams(slow_engine: Engine) -> None:
    before = set(threading.enumerate())  # servers of other tests may be running
    with serve(slow_engine) as running:
        watcher = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
        watcher.request("GET", "/live")
        reader = completion(running, max_tokens=90, stream=True)
        wait_for(lambda: running.server.worker.tokens >= 2)
    watcher.close()
    reader.close()
    assert running.server.worker.tokens < 85  # it had 3 s to come to its end, and no more
    assert not any(thread.name == "mbq-engine" for thread in set(threading.enumerate()) - before)


@pytest.mark.parametrize("stream", [True, False])
def test_a_reply_that_the_stop_of_the_server_cuts_ends_with_an_error(
    slow_engine: Engine, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with serve(slow_engine) as running:
        requests = [completion(running, max_tokens=90, stream=stream) for _ in range(2)]
        wait_for(lambda: running.server.worker.tokens >= 2 and running.server.worker.waiting == 1)
    for request in requests:
        answer = request.getresponse()
        assert answer.status == (200 if stream else 503)
        last = answer.read().decode().strip().split("\n\n")[-1].removeprefix("data: ")
        assert json.loads(last)["error"]["code"] == "server_stopping"
        request.close()
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]


def test_a_short_reply_ends_whole_when_the_server_stops(slow_engine: Engine) -> None:
    with serve(slow_engine) as running:
        request = completion(running, max_tokens=20)
        wait_for(lambda: running.server.worker.tokens >= 2)
    assert text(request) == ("ABCDEFG" * 3)[1:21]


def test_a_stream_that_waits_has_its_headers_and_comments(slow_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "_COMMENT_S", 0.2)
    with serve(slow_engine) as running:
        first = completion(running, max_tokens=60)
        wait_for(lambda: running.server.worker.running)
        waits = completion(running, stream=True, max_tokens=3)
        answer = waits.getresponse()  # the headers
        assert running.server.worker.waiting == 1
        assert [answer.readline() for _ in range(4)] == [b": the reply is on its way\n", b"\n"] * 2
        assert running.server.worker.waiting == 1
        rest = answer.read().decode()
        chunks = [json.loads(line[6:]) for line in rest.split("\n\n") if line.startswith("data: {")]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "BCD"
        waits.close()
        text(first)


def test_a_client_of_openai_reads_past_the_comments(slow_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "_COMMENT_S", 0.01)
    with serve(slow_engine) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(model="tiny", prompt="xA", temperature=0, max_tokens=9, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == "BCDEFGABC"
        events = client.responses.create(model="tiny", input="hello", temperature=0, max_output_tokens=9, stream=True)
        assert "".join(one.delta for one in events if one.type == "response.output_text.delta") == REPLY[:8]
        client.close()


@pytest.mark.heavy
def test_memory_stays_flat_under_many_clients(bundle: Path) -> None:
    """The short form of the benchmark, against a server in its own process."""
    soak = Path(__file__).parents[2] / "benchmarks" / "serve_soak.py"
    command = [sys.executable, str(soak), str(bundle), "--seconds", "10", "--queue", "8"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "none lost or mixed up, memory flat" in done.stdout
    assert "'right': " in done.stdout
