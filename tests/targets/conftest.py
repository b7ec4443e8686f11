"""Libraries for the machine the tests run on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mbq_runtime.bundle.isa import problem, this_machine
from mbq_targets.build import build_ops_library
from mbq_targets.machines import TARGETS, Target
from mbq_targets.spec import KernelSpec

Build = Callable[[str, KernelSpec], Path]


def runnable() -> list[Target]:
    """One native target per kernel instruction set that this machine can run."""
    machine = this_machine()
    targets = [t for t in TARGETS.values() if t.native and problem(t, machine) is None]
    return list({target.isa: target for target in targets}.values())


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """(target name, spec) -> path of the built library; each is built once."""
    folder = tmp_path_factory.mktemp("libraries")

    def build(target: str, spec: KernelSpec) -> Path:
        path = folder / f"{target} {spec}.so"
        if not path.exists():
            build_ops_library(TARGETS[target], spec, path)
        return path

    return build
