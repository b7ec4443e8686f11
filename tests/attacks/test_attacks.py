"""Each hostile bundle is refused by verify, inspect and run alike: one line, little memory, little time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundles import ATTACKS, ESCAPES, MANIFEST, REASONS, attack
from forked_mbq import Mbq, forks
from json_fields import set_in
from tiny_bundle import write_bundle, write_manifest

COMMANDS: tuple[tuple[str, ...], ...] = (("verify",), ("inspect",), ("run",))
MOST_MB = 200
MOST_TIMES = 50
"""Processor time of a refusal, as a multiple of that of running the good bundle."""

IN_TURN = 6
"""The quick tier has one of so many attacks: neighbours are alike."""
QUICK = [name for name in ATTACKS[::IN_TURN] if not name.startswith("20,000")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mbq]:
    """Runs ``mbq`` with arguments and measures it."""
    with forks(tmp_path_factory.mktemp("elsewhere")) as mbq:  # what a bundle would load from the current folder
        yield mbq


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("attacks") / "bundle")


@pytest.fixture(scope="module")
def good_s(run: Mbq, good: Path) -> float:
    """Processor time of running the good bundle."""
    return min(run(arguments(("run",), good)).seconds for _ in range(3))


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "bundle"))


def arguments(command: tuple[str, ...], folder: Path) -> list[str]:
    rest = ["A", "--raw", "--max-tokens", "2"] if command == ("run",) else []
    return [*command, str(folder), *rest]


def test_the_good_bundle_is_accepted(run: Mbq, good: Path) -> None:
    for command in COMMANDS:
        found = run(arguments(command, good))
        assert found.code == 0, found
        assert found.out


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.heavy] * (name not in QUICK)) for name in ATTACKS]
)
def test_attack(run: Mbq, copy: Path, good_s: float, name: str) -> None:
    attack(copy, name)
    said = []
    for command in COMMANDS:
        found = run(arguments(command, copy))
        lines = found.err.splitlines()
        assert found.code == 4, found
        assert len(lines) == 1, found
        assert lines[0].startswith("mbq: error: ")
        assert lines[0].isprintable()
        assert len(lines[0]) < 1000
        assert found.out == ""
        assert found.mb < MOST_MB
        assert found.seconds < MOST_TIMES * good_s
        said.append(lines[0])
    assert len(set(said)) == 1
    assert REASONS.get(name, "") in said[0]
    shutil.rmtree(copy)


def test_a_tokenizer_that_is_no_tokenizer(run: Mbq, copy: Path) -> None:
    """Only what loads it knows."""
    (copy / "tokenizer.json").write_text("{}")
    write_manifest(copy)
    verified, ran = (run(arguments(command, copy)) for command in (("verify",), ("run",)))
    assert verified.code == ran.code == 4
    assert verified.err == ran.err
    assert verified.err.count("\n") == 1


@pytest.mark.parametrize("field", ["model.name", "model.architecture", "target.name", "target.cpu", "router.kind"])
def test_names_do_not_command_the_terminal(run: Mbq, copy: Path, field: str) -> None:
    set_in(copy / MANIFEST, field, f"a{ESCAPES}b")
    for command in COMMANDS:
        found = run(arguments(command, copy))
        assert (found.out + found.err).replace("\n", "").isprintable()


def test_errors_do_not_command_the_terminal(run: Mbq, copy: Path) -> None:
    set_in(copy / MANIFEST, "layout", f"a{ESCAPES}b")
    for command in COMMANDS:
        found = run(arguments(command, copy))
        assert found.code == 4
        assert found.err.rstrip("\n").isprintable()
