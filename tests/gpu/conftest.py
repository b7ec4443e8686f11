"""The devices of this machine, once for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from devices import Runner

from mbq_runtime.errors import UsageError


@pytest.fixture(autouse=True)
def binary_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Binaries of one test are of no use to another."""
    monkeypatch.setenv("MBQ_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="session", params=["opencl", "wgsl"])
def runner(request: pytest.FixtureRequest) -> Runner:
    try:
        return Runner(request.param)
    except UsageError as error:
        pytest.skip(str(error))
