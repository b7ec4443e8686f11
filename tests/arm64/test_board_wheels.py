"""The base install has wheels for every board system that docs/on-the-board.md names, and for no other.

pip resolves the requirements for the system's Python and C library.  It installs nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from board_packages import base_requirements

ENGINES = {"numpy", "onnxruntime", "onnxruntime-genai", "tokenizers"}
pytestmark = pytest.mark.slow


def resolve(folder: Path, python: str, *platforms: str) -> subprocess.CompletedProcess[str]:
    """Let pip choose wheels for a system; the report is in ``folder``."""
    chosen = [f"--platform={platform}" for platform in platforms]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--only-binary=:all:"]
    command += ["--python-version", python, "--target", str(folder / "none"), "--report", str(folder / "report.json")]
    command += [*chosen, *base_requirements()]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False)


def glibc(minor: int) -> list[str]:
    return [*(f"manylinux_2_{i}_aarch64" for i in range(minor, 16, -1)), "manylinux2014_aarch64"]


@pytest.mark.parametrize(
    ("python", "minor"),
    [
        pytest.param("3.11", 36, id="Raspberry Pi OS Bookworm"),
        pytest.param("3.13", 41, id="Raspberry Pi OS Trixie, Debian in Termux"),
        pytest.param("3.11", 35, id="JetPack 6 with Python 3.11"),
        pytest.param("3.12", 39, id="JetPack 7"),
    ],
)
def test_a_board_has_wheels(tmp_path: Path, python: str, minor: int) -> None:
    done = resolve(tmp_path, python, *glibc(minor))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    names = {one["metadata"]["name"].lower().replace("_", "-") for one in report["install"]}
    assert names >= ENGINES
    assert "torch" not in names


@pytest.mark.parametrize(
    ("python", "platforms"),
    [
        pytest.param("3.10", glibc(35), id="JetPack 6 with its own Python"),
        pytest.param("3.11", ["linux_armv7l", "manylinux2014_armv7l", "manylinux_2_31_armv7l"], id="32-bit"),
        pytest.param("3.12", ["musllinux_1_2_aarch64", "musllinux_1_1_aarch64"], id="musl"),
        pytest.param("3.12", ["android_24_arm64_v8a", "linux_aarch64"], id="Termux"),
    ],
)
def test_a_system_that_the_page_excludes_has_none(tmp_path: Path, python: str, platforms: list[str]) -> None:
    done = resolve(tmp_path, python, *platforms)
    assert done.returncode != 0
    assert "No matching distribution found" in done.stderr
