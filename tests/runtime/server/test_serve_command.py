"""``mbq serve`` and ``mbq monitor`` as a user runs them, with the sensors of this machine."""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import openai
import pytest
from serving import PATIENCE_S
from tiny_bundle import REPLY

from mbq_runtime import cli

MBQ = [sys.executable, "-m", "mbq_runtime.cli"]


@contextmanager
def mbq_serve(bundle: Path, *args: str, **environment: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Yield the address and the process of a server."""
    command = [*MBQ, "serve", str(bundle), "--port", "0", "--threads", "1", *args]
    served = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    try:
        assert served.stdout is not None
        line = served.stdout.readline()
        found = re.fullmatch(r"tiny: (http://127\.0\.0\.1:\d+)/v1 for clients, .*\n", line)
        assert found, (line, served.stderr and served.stderr.read())
        yield found[1], served
    finally:
        served.kill()
        served.communicate()


def test_it_serves_and_ends_on_interrupt(bundle: Path, tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    with mbq_serve(bundle, "--policy", "auto", "--min-bits", "4", "--events", str(events)) as (address, served):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        found = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hello"}], temperature=0, extra_body={"avg_bits": 5}
        )
        assert found.choices[0].message.content == REPLY
        assert found.usage is not None
        assert found.usage.model_dump()["avg_bits"] == pytest.approx(5.1, abs=0.01)
        with pytest.raises(openai.BadRequestError, match="this server offers 4 to 8 bits"):
            client.completions.create(model="tiny", prompt="A", extra_body={"avg_bits": 3})
        metrics = http.client.HTTPConnection(address.removeprefix("http://"), timeout=PATIENCE_S)
        metrics.request("GET", "/metrics")
        bits = re.search(r"^mbq_avg_bits ([\d.]+)$", metrics.getresponse().read().decode(), re.MULTILINE)
        assert bits is not None
        assert 4 <= float(bits[1]) <= 8
        served.send_signal(signal.SIGINT)
        assert served.wait(PATIENCE_S) == 130
        assert served.stderr is not None
        assert served.stderr.read().strip() == ""
    assert all("reason" in json.loads(line) for line in events.read_text().splitlines())


SLOW = """
import sys, time
from mbq_runtime import Engine
load = Engine.load
def slow(*given, **options):
    engine = load(*given, **options)
    engine.add_listener(lambda seconds, bits: time.sleep(0.1))
    return engine
Engine.load = slow
from mbq_runtime.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""``mbq`` with an engine whose tokens take a tenth of a second."""


def test_sigterm_ends_a_stream_in_time_and_the_log_stays_clean(bundle: Path) -> None:
    command = [sys.executable, "-c", SLOW, "serve", str(bundle), "--port", "0", "--bits", "8"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as served:
        assert served.stdout is not None
        assert served.stderr is not None
        found = re.search(r"127\.0\.0\.1:\d+", served.stdout.readline())
        assert found is not None
        client = http.client.HTTPConnection(found[0], timeout=PATIENCE_S)
        body = {"prompt": "xA", "stream": True, "max_tokens": 90}
        client.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = client.getresponse()
        assert answer.readline().startswith(b"data: ")
        served.send_signal(signal.SIGTERM)
        assert b'"code":"server_stopping"' in answer.read().split(b"data: ")[-1]
        assert served.wait(PATIENCE_S) == 128 + signal.SIGTERM
        assert served.stderr.read() == ""


def wait_until_healthy(address: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        client = http.client.HTTPConnection(address, timeout=PATIENCE_S)
        try:
            client.request("GET", "/health")
            assert client.getresponse().status == 200
            return
        except ConnectionError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        finally:
            client.close()


ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


@pytest.mark.parametrize("number", ENDS)
@pytest.mark.parametrize(
    ("args", "begun"),
    [(("serve", "BUNDLE", "--port", "0", "--bits", "8"), "tiny: "), (("run", "BUNDLE", "A", "--bits", "8"), "H")],
)
def test_a_signal_leaves_no_files(
    bundle: Path, tmp_path: Path, number: signal.Signals, args: tuple[str, ...], begun: str
) -> None:
    """Each command ends as after Ctrl-C: it cleans up, and its exit code tells the signal."""
    command = [sys.executable, "-c", SLOW, *(str(bundle) if arg == "BUNDLE" else arg for arg in args)]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(len(begun)) == begun
        assert [*tmp_path.iterdir()]
        if args[0] == "serve":  # the address is said before the loop of events runs
            found = re.search(r"127\.0\.0\.1:\d+", process.stdout.readline())
            assert found is not None
            wait_until_healthy(found[0])
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == 128 + number
        assert process.stderr.read().strip() == ""
    assert [*tmp_path.iterdir()] == []


def test_a_signal_that_the_caller_ignores_ends_nothing(bundle: Path) -> None:
    """As below nohup."""
    ignoring = f"import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n{SLOW}"
    command = [sys.executable, "-c", ignoring, "run", str(bundle), "xA", "--bits", "8", "--max-tokens", "5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGHUP)
        process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0


@pytest.mark.heavy
def test_context_bounds_a_request_s_memory(bundle: Path) -> None:
    with mbq_serve(bundle, "--bits", "8", "--context", "30") as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        assert client.models.list().data[0].model_dump()["context_length"] == 30
        found = client.completions.create(model="tiny", prompt="xA", temperature=0, max_tokens=10**6)
        assert found.usage is not None
        assert found.usage.total_tokens == 30


@pytest.mark.heavy
def test_the_key_comes_from_the_environment(bundle: Path) -> None:
    with mbq_serve(bundle, MBQ_API_KEY="sesame") as (address, _):
        assert openai.OpenAI(base_url=f"{address}/v1", api_key="sesame").models.list().data[0].id == "tiny"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="other", max_retries=0).models.list()
        done = subprocess.run([*MBQ, "monitor", address], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "refused with status 401; give the server's --api-key" in done.stderr


@pytest.mark.heavy
def test_monitor_follows_a_server(bundle: Path) -> None:
    with mbq_serve(bundle, "--bits", "5") as (address, served):
        watcher = subprocess.Popen([*MBQ, "monitor", address + "/"], stdout=subprocess.PIPE, text=True)
        assert watcher.stdout is not None
        heading = watcher.stdout.readline().split()
        assert heading == ["time", "bits", "used", "tokens/s", "°C", "W", "J/token", "waiting", "reason"]
        first, second = (watcher.stdout.readline().split() for _ in range(2))
        assert (first[1], first[2], first[7]) == ("5.0", "-", "0")
        assert second[0] >= first[0]
        served.send_signal(signal.SIGINT)
        assert watcher.wait(PATIENCE_S) == 0  # the server said good-bye
        watcher.stdout.close()


@pytest.mark.heavy
def test_monitor_on_a_terminal_redraws_one_line(bundle: Path) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 60, 0, 0))
    with mbq_serve(bundle, "--bits", "5") as (address, served):
        watcher = subprocess.Popen([*MBQ, "monitor", address], stdout=slave)
        os.close(slave)
        seen = ""
        while seen.count("\r\x1b[K") < 3:
            seen += os.read(master, 1 << 16).decode()
        assert seen.startswith(f"{address}/ shows this in a browser")
        *_, last = seen.split("\r\x1b[K")
        assert last.split()[1] == "5.0"
        assert len(last) < 60  # it must not wrap, or the next one would not land on it
        served.send_signal(signal.SIGINT)
        assert watcher.wait(PATIENCE_S) == 0
    os.close(master)


def test_monitor_opens_the_page(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(click, "launch", opened.append)
    assert run(capsys, "monitor", "http://board:8080/", "--open") == (0, "", "")
    assert opened == ["http://board:8080"]


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = cli.main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_monitor_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    code, _, err = run(capsys, "monitor", f"http://127.0.0.1:{port}")
    assert code == 2
    assert "no server there" in err
    assert "start one with mbq serve" in err


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        code, out, err = run(capsys, "serve", bundle, "--port", sock.getsockname()[1])
    assert (code, out) == (2, "")
    assert "(Address already in use); choose another" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--api-key", " "], "--api-key is empty"),
        (["--allow-origin", "chat.example/"], "--allow-origin 'chat.example/': needed an origin"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        (["--bits", "2"], "2"),
        (["--policy", "wild"], "policy 'wild': needed one of fixed, auto"),
        (["--bits", "4", "--policy", "auto"], "--bits fixes the budget"),
        (["--queue", "-1"], "--queue"),
        (["--context", "97"], "takes 2 to 96 tokens"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], bundle: Path, args: list[str], message: str) -> None:
    code, out, err = run(capsys, "serve", bundle, "--port", 0, *args)
    assert (code, out) == (2, "")
    assert err.startswith("mbq: error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("more", "code", "message"), [([], 2, "http is not encrypted"), (["--allow-http"], 4, "check the")]
)
def test_allow_http_is_of_each_bundle(
    capsys: pytest.CaptureFixture[str], bundle: Path, more: list[str], code: int, message: str
) -> None:
    found, _, err = run(capsys, "serve", bundle, "http://0.0.0.0:1/other", "--port", 0, *more)
    assert (found, err.count("\n")) == (code, 1)
    assert message in err


def test_what_to_install(capsys: pytest.CaptureFixture[str], bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = run(capsys, "serve", bundle)
    assert code == 2
    assert "pip install 'mbq-export[serve]'" in err
