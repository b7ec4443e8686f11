"""Every requirement states one lowest version, so that the lowest-versions job can install it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

REPO = Path(__file__).parents[1]
SCRIPT = REPO / "tests" / "tools" / "lowest_versions.py"


def test_every_extra_has_pins() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    command = [sys.executable, SCRIPT, *project["optional-dependencies"]]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    pins = dict(line.split("==") for line in done.stdout.splitlines())
    assert pins["click"] == "8.4.2"
    assert {"torch", "uvicorn", "pytest", "llama-cpp-python"} <= set(pins)
    assert "mbq-export" not in pins


def test_only_what_is_asked_for() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, encoding="utf-8", check=True)
    names = {line.split("==")[0] for line in done.stdout.splitlines()}
    assert names == {"click", "httpx2", "jinja2", "numpy", "onnxruntime", "onnxruntime-genai", "tokenizers"}
