"""Each command survives that stdin, stdout or stderr is closed: it ends quietly, or with one line."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

STREAMS = {"stdin": "<&-", "stdout": ">&-", "stderr": "2>&-"}
COMMANDS = (
    "--help", "chat B", "run B -", "inspect B", "verify B", "list", "sense --seconds 0", "monitor http://x:1",
    "perplexity B --data missing",
)  # fmt: skip
MBQ = 'python=$1; shift; "$python" -m mbq_runtime.cli "$@"'


def closed(tmp_path: Path, program: str, *args: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command of the shell, which reads an empty stdin."""
    done = subprocess.run(
        ["sh", "-c", program, "sh", sys.executable, *map(str, args)], stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=60, cwd=tmp_path, env={**os.environ, "MBQ_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("stream", STREAMS)
def test_run(bundle: Path, tmp_path: Path, stream: str) -> None:
    program = f"{MBQ} {STREAMS[stream]}"
    args = ("run", bundle, "xA", "--raw", "--max-tokens", 3, "--threads", 1)
    code, out, err = closed(tmp_path, program, *args)
    assert code == 0, err
    assert out == ("" if stream == "stdout" else "BCD\n")
    assert err.count("\n") == (0 if stream == "stderr" else 2), err


@pytest.mark.parametrize(
    ("name", "stream"),
    list(product(COMMANDS, STREAMS)),
)
def test_other_commands(bundle: Path, tmp_path: Path, name: str, stream: str) -> None:
    program = f"{MBQ} {STREAMS[stream]}"
    args = [str(bundle) if part == "B" else part for part in name.split()]
    code, _, err = closed(tmp_path, program, *args)
    assert code in (0, 1, 2), err
    assert not any(word in err for word in ("fault", "Traceback", "NoneType")), err
    assert err.count("mbq: error") <= 1


def test_all_three(bundle: Path, tmp_path: Path) -> None:
    assert (
        closed(tmp_path, f"{MBQ} <&- >&- 2>&-", "run", bundle, "xA", "--raw", "--max-tokens", 3, "--threads", 1)[0] == 0
    )


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("args", ["--list-targets", "--model missing"])
def test_the_export(tmp_path: Path, stream: str, args: str) -> None:
    program = f'python=$1; shift; "$python" -m mbq_export.cli "$@" {STREAMS[stream]}'
    code, _, err = closed(tmp_path, program, *args.split())
    assert code == (0 if args == "--list-targets" else 3), err
    assert not any(word in err for word in ("fault", "Traceback", "NoneType")), err
