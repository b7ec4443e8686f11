"""A wheel holds every file of the packages: each that is no Python is named in pyproject.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
PACKAGES = {"mbq_export": REPO, "mbq_runtime": REPO / "runtime", "mbq_targets": REPO / "targets"}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_is_named(package: str) -> None:
    tools = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folder = PACKAGES[package] / package
    named = {file for pattern in tools["package-data"][package] for file in folder.glob(pattern)}
    files = {file for file in folder.rglob("*") if file.is_file() and file.parent.name != "__pycache__"}
    modules = {file for file in files if file.suffix == ".py"}
    assert files - modules == named
    assert all((file.parent / "__init__.py").is_file() for file in modules), "a folder without it is no package"
