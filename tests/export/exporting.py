"""Exports as a person runs them, in processes of their own: whole, or killed on the way."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from hashlib import file_digest
from pathlib import Path

from warm_start import COMMAND, Running

_PATIENCE_S = 240


def export(model: Path, text: Path, output: Path, *more: str) -> list[str]:
    """The command for a bundle of a tiny model."""
    command = [*COMMAND, "--target", "portable", "--model", str(model)]
    return [*command, "--output", str(output), "--calib-data", str(text), "--calib-tokens", "2048", *more]


def run(command: list[str]) -> str:
    """What the command said on stdout, and then on stderr."""
    process = start(command)
    said = "".join(process.communicate(timeout=_PATIENCE_S))
    assert process.returncode == 0, said
    return said


def kill_once(command: list[str], reached: Callable[[], bool]) -> None:
    """Run the command and kill it as soon as it has ``reached`` something."""
    kill_all([start(command)], reached)


def kill_all(processes: Sequence[Running | subprocess.Popen[str]], reached: Callable[[], bool]) -> None:
    """Kill processes as soon as they have ``reached`` something."""
    deadline = time.monotonic() + _PATIENCE_S
    while not reached():
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate()


def start(command: list[str]) -> Running | subprocess.Popen[str]:
    """Start a command: an export in a process that has its libraries already."""
    if command[: len(COMMAND)] == COMMAND:
        return Running(command[len(COMMAND) :])
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path in the folder."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            found[path.relative_to(folder).as_posix()] = file_digest(file, "sha256").hexdigest()
    return found
