"""Exports as a person runs them, in processes of their own: whole, or killed on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import file_digest
from pathlib import Path

_PATIENCE_S = 240


def export(model: Path, text: Path, output: Path, *more: str) -> list[str]:
    """The command for a bundle of a tiny model."""
    command = [sys.executable, "-m", "mbq_export.cli", "--target", "portable", "--model", str(model)]
    return [*command, "--output", str(output), "--calib-data", str(text), "--calib-tokens", "2048", *more]


def run(command: list[str]) -> str:
    """What the command said on stdout, and then on stderr."""
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def kill_once(command: list[str], reached: Callable[[], bool]) -> None:
    """Run the command and kill it, and all that it has started, as soon as it has ``reached`` something."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + _PATIENCE_S
    while not reached():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # Nobody asks a child before its parent: ``torchrun`` puts those that it starts into sessions of their own.
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path in the folder."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            found[path.relative_to(folder).as_posix()] = file_digest(file, "sha256").hexdigest()
    return found
