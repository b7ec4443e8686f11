"""What a newcomer does: follow a page of docs/extending in a copy of the tree, and use what it adds.

    python tests/tools/newcomer.py policy|board|family

The diffs of the page are applied as they stand.  Then its table is used: listed, checked by the page's own tests,
and run.  The command fails if a diff does not fit, changes 20 lines or more, or what was added does not work.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
COPIED = ("mbq_export", "runtime", "targets", "tests", "docs", "examples", "pyproject.toml", "constraints.txt")
MOST_LINES = 20
_FENCE = re.compile(r"^```diff\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PLACE = re.compile(r"^ ?# ([\w./]+\.py), in (\w+)")

TINY_MODEL = """
import sys
from pathlib import Path
sys.path.insert(0, "tests/export")
from tiny_models import write_checkpoint
write_checkpoint(Path("{name}"), "{name}")
"""


@dataclass(frozen=True)
class Change:
    """One diff of a page.

    path: file that it changes, relative to the repository
    old: text that must be in the file once
    new: text in its place
    lines: number of added and of removed lines
    """

    path: str
    old: str
    new: str
    lines: int


@dataclass(frozen=True)
class Use:
    """How to use what a page adds.

    command: arguments of Python, run in the copy
    said: text that the command must print
    """

    command: tuple[str, ...]
    said: str


USES = {
    "policy": (
        Use(("-m", "mbq_runtime.cli", "simulate", "pi5-tower", "--policy", "solar"), "solar"),
        Use(("-m", "pytest", "-q", "tests/runtime", "-k", "lasting or find"), "passed"),
    ),
    "board": (
        Use(("-m", "mbq_export.cli", "--list-targets"), "rock5"),
        Use(("-m", "mbq_targets.show", "rock5"), "gemv_d2"),
        Use(("-m", "pytest", "-q", "tests/targets/test_table.py"), "passed"),
    ),
    "family": (
        Use(("-c", TINY_MODEL.format(name="glm")), ""),
        Use(("-m", "mbq_export.cli", "--model", "glm", "--target", "portable", "--dry-run"), "GlmForCausalLM"),
        Use(("-m", "pytest", "-q", "tests/export/test_every_family.py", "-k", "[glm]"), "passed"),
    ),
}
"""Page -> what to do after its diffs."""


def changes(page: str) -> list[Change]:
    """Read the diffs of a page.

    Args:
        page: text of the page.

    Returns:
        The diffs whose first line names a file, in order.
    """
    found = []
    for diff in _FENCE.findall(page):
        head, *lines = diff.splitlines()
        place = _PLACE.match(head)
        if place is None:
            raise SystemExit(f"a diff begins with {head!r}, needed '# FILE.py, in NAME'")
        old = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "+")
        new = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "-")
        found.append(Change(place[1], old, new, sum(line[:1] in ("+", "-") for line in lines)))
    return found


def located(path: str, tree: Path) -> Path:
    """Find the file that a page names, with or without the folder that holds its package.

    Args:
        path: file as the page names it.
        tree: root of the copy.
    """
    for folder in ("", "runtime", "targets"):
        if (tree / folder / path).is_file():
            return tree / folder / path
    raise SystemExit(f"{path}: no such file")


def apply(change: Change, tree: Path) -> None:
    """Change one file.

    Args:
        change: the diff.
        tree: root of the copy.
    """
    file = located(change.path, tree)
    text = file.read_text(encoding="utf-8")
    if text.count(change.old) != 1:
        raise SystemExit(f"{change.path}: the diff's context is there {text.count(change.old)} times:\n{change.old}")
    file.write_text(text.replace(change.old, change.new), encoding="utf-8")


def use(row: Use, tree: Path) -> None:
    """Run one command in the copy.

    Args:
        row: the command and what it must print.
        tree: root of the copy.
    """
    roots = (tree, tree / "runtime", tree / "targets")
    done = subprocess.run(
        [sys.executable, *row.command],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, roots)), "COLUMNS": "160"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode != 0 or row.said not in done.stdout + done.stderr:
        raise SystemExit(f"{' '.join(row.command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")


def follow(name: str, scratch: Path) -> int:
    """Follow a page.

    Args:
        name: its name without suffix.
        scratch: empty folder, for the copy.

    Returns:
        The number of changed lines.
    """
    for part in COPIED:
        source, target = REPO / part, scratch / part
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, target)
    found = changes((scratch / "docs" / "extending" / f"{name}.md").read_text(encoding="utf-8"))
    lines = sum(change.lines for change in found)
    if not 0 < lines < MOST_LINES:
        raise SystemExit(f"{name}.md changes {lines} lines, needed 1 to {MOST_LINES - 1}")
    for change in found:
        apply(change, scratch)
    for row in USES[name]:
        use(row, scratch)
    return lines


def main() -> None:
    """Follow the page that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", choices=USES)
    page = parser.parse_args().page
    with tempfile.TemporaryDirectory() as scratch:
        print(f"docs/extending/{page}.md: {follow(page, Path(scratch))} changed lines, and it works")


if __name__ == "__main__":
    main()
