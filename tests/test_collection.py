"""Any subset of the test folders collects together."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
REPO = TESTS.parent
OWN_PROGRAMS = ("tools", "benchmarks")
"""Folders of programs that find their neighbours by themselves."""


def helpers() -> list[Path]:
    """List the modules that tests import."""
    files = (file for file in TESTS.rglob("*.py") if file.relative_to(TESTS).parts[0] not in OWN_PROGRAMS)
    return [file for file in files if file.name != "conftest.py" and not file.name.startswith("test_")]


def test_helpers_have_unique_names_and_lie_on_the_path() -> None:
    counts = Counter(file.stem for file in helpers())
    assert [name for name, count in counts.items() if count > 1] == []
    assert [name for name in counts if name in sys.stdlib_module_names] == []
    options = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert {file.parent for file in helpers()} == {REPO / folder for folder in options["pythonpath"]}
    assert "--import-mode=importlib" in options["addopts"]


def test_no_test_imports_a_conftest() -> None:
    for file in TESTS.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "conftest" in text else ():
            found = [node.module] if isinstance(node, ast.ImportFrom) else []
            found += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert "conftest" not in found, f"{file}: put what is shared into a helper module"


@pytest.mark.heavy
def test_two_folders_with_a_conftest_each_collect_together() -> None:
    folders = [TESTS / "sensing", TESTS / "runtime" / "server", TESTS / "runtime" / "control"]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *map(str, folders)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout
