from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked_mbq import Mbq, forks
from tiny_bundle import write_bundle

from mbq_runtime import Engine


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runnable bundle.  A test must not change it."""
    return write_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture
def bundle_copy(bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


@pytest.fixture(scope="session")
def loaded(bundle: Path) -> Engine:
    return Engine.load(bundle, threads=1)


@pytest.fixture
def engine(loaded: Engine) -> Engine:
    """The loaded bundle at its default budget."""
    loaded.avg_bits = loaded.manifest.budget.default_bits
    return loaded


@pytest.fixture(scope="session")
def mbq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mbq]:
    """Runs ``mbq`` as a person does: in a process of its own."""
    with forks(tmp_path_factory.mktemp("elsewhere")) as run:
        yield run
