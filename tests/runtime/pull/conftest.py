from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from file_server import CHUNK_BYTES, CHUNKS, WEIGHTS, FileServer, serving
from tiny_bundle import write_bundle, write_manifest

from mbq_runtime.bundle import listed_files
from mbq_runtime.pull import fetch


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small chunks, no pauses, a cache of the test's own, and no token of the machine."""
    monkeypatch.setattr(listed_files, "CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(fetch, "_PAUSE_S", 0.0)
    monkeypatch.setenv("MBQ_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("MBQ_PULL_TOKEN", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A bundle that runs, with a file of many chunks."""
    folder = write_bundle(tmp_path / "served" / "tiny")
    (folder / WEIGHTS).write_bytes(random.Random(0).randbytes((CHUNKS - 1) * CHUNK_BYTES + 777))
    write_manifest(folder)
    return folder


@pytest.fixture
def server(published: Path) -> Iterator[FileServer]:
    with serving(published.parent) as found:
        yield found
