"""The devices of this machine, once for all tests."""

from __future__ import annotations

from pathlib import Path

import needs
import pytest
from devices import DEVICES, Runner


@pytest.fixture(autouse=True)
def binary_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Binaries of one test are of no use to another."""
    monkeypatch.setenv("MBQ_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="session", params=["opencl", "wgsl"])
def runner(request: pytest.FixtureRequest) -> Runner:
    needs.gpu({"opencl": "opencl", "wgsl": "webgpu"}[request.param])
    return Runner(request.param, DEVICES[request.param]())
