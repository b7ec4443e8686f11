"""A newcomer follows a page of docs/extending/ in a fresh copy of the repository.

The test applies the ``diff`` blocks of the page and then runs the page's ``python`` commands.  The first line of a diff
block is a comment with the file's path; the lines after it are one hunk, found by its context.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT, SHELL, Block, blocks, commands

MOST_CHANGED_LINES = 20


def _diffs(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "diff"]


PAGES_WITH_ROWS = [page for page in sorted((ROOT / "docs" / "extending").glob("*.md")) if _diffs(page)]


def _programs(page: Path) -> list[list[str]]:
    """The commands of the page that run Python programs of the repository."""
    found = [command for block in blocks(page) if block.language in SHELL for command in commands(block)]
    return [shlex.split(command)[1:] for command in found if command.startswith("python ")]


def _apply(block: Block, repository: Path) -> int:
    """Change a file as a diff block says.  Returns how many lines were added or removed."""
    heading, *lines = block.text.splitlines()
    path = repository / heading.strip("# ").partition(",")[0]
    before = "\n".join(line[1:] for line in lines if line[:1] != "+")
    after = "\n".join(line[1:] for line in lines if line[:1] != "-")
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{block.page}:{block.line}: {path.name} has no such lines, or has them twice"
    path.write_text(text.replace(before, after), encoding="utf-8")
    return sum(line[:1] in ("+", "-") for line in lines)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files of the repository that git knows or would add, in a folder of their own."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, encoding="utf-8",
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_family_board_and_policy_are_rows() -> None:
    assert {page.stem for page in PAGES_WITH_ROWS} >= {"family", "board", "policy"}


@pytest.mark.parametrize("page", PAGES_WITH_ROWS, ids=lambda page: page.stem)
def test_a_row_is_added_by_its_page(page: Path, clone: Path) -> None:
    changed = sum(_apply(block, clone) for block in _diffs(page))
    assert 0 < changed < MOST_CHANGED_LINES
    programs = _programs(page)
    assert programs, f"{page.name}: no python command shows that the row works"
    paths = os.pathsep.join(str(clone / folder) for folder in (".", "runtime", "targets"))
    for arguments in programs:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=clone, env=os.environ | {"PYTHONPATH": paths},
            capture_output=True, encoding="utf-8", check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout}{done.stderr}"
