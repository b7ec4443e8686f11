"""Libraries for the machine the tests run on."""

from __future__ import annotations

from pathlib import Path

import pytest
from op_libraries import Build

from mbq_targets.build import build_ops_library
from mbq_targets.machines import TARGETS
from mbq_targets.spec import KernelSpec


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Build each library once."""
    folder = tmp_path_factory.mktemp("libraries")

    def build(target: str, spec: KernelSpec) -> Path:
        path = folder / f"{target} {spec}.so"
        if not path.exists():
            build_ops_library(TARGETS[target], spec, path)
        return path

    return build
