"""A finished export is used again only for the same inputs, and only whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import finished_exports
import pytest
from finished_exports import REPO, finished, key, sources
from tiny_bundle import write_bundle


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The options of every export that ran; an export writes the tiny bundle."""
    ran: list[str] = []

    def export(options: list[str], folder: Path) -> None:
        ran.append(" ".join(options))
        write_bundle(folder / "bundle")

    monkeypatch.setattr(finished_exports, "_export", export)
    monkeypatch.setenv("MBQ_TEST_CACHE", str(tmp_path / "cache"))
    return ran


def test_the_same_inputs_export_once(exported: list[str], tmp_path: Path) -> None:
    first = finished(["--seed", "1"], tmp_path)
    assert finished(["--seed", "1"], tmp_path) == first
    assert finished(["--seed", "2"], tmp_path) != first
    assert exported == ["--seed 1", "--seed 2"]


def test_a_damaged_export_is_made_again(exported: list[str], tmp_path: Path) -> None:
    folder = finished([], tmp_path)
    damaged = next(file for file in (folder / "bundle").iterdir() if file.suffix == ".onnx")
    damaged.write_bytes(b"\0" + damaged.read_bytes()[1:])
    assert finished_exports.is_whole(finished([], tmp_path))
    assert len(exported) == 2


def test_zero_turns_the_cache_off(exported: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBQ_TEST_CACHE", "0")
    assert finished([], tmp_path / "a") == tmp_path / "a"
    assert finished([], tmp_path / "b") == tmp_path / "b"
    assert len(exported) == 2


def test_old_exports_go(exported: list[str], tmp_path: Path) -> None:
    folders = [finished([str(i)], tmp_path) for i in range(finished_exports.KEPT + 2)]
    assert [folder.exists() for folder in folders] == [False] * 2 + [True] * finished_exports.KEPT


def test_the_key_follows_the_sources(tmp_path: Path) -> None:
    for file in [*sources(), REPO / "constraints.txt"]:
        copy = tmp_path / file.relative_to(REPO)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    assert key([], tmp_path) == key([])
    for name in ("mbq_export/calibrate.py", "targets/mbq_targets/spec.py", "constraints.txt"):
        with (tmp_path / name).open("a") as file:
            file.write("# changed\n")
    assert key([], tmp_path) != key([])
