"""The tables and figures of README.md and docs/ come from results/."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLES = ROOT / "docs" / "tables.py"
FACTS = ("title", "date", "machine", "commit", "published_in", "command", "notes", "rows")


def _copy(folder: Path) -> Path:
    """A copy of what the script reads and writes, to be changed."""
    shutil.copy(ROOT / "README.md", folder)
    for name in ("docs", "results"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def _check(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "docs" / "tables.py"), *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False)


def test_the_tables_are_those_of_the_results() -> None:
    done = _check(ROOT, "--check")
    assert done.returncode == 0, done.stderr


def test_a_changed_result_is_noticed_and_written(tmp_path: Path) -> None:
    root = _copy(tmp_path)
    path = root / "results" / "kl-divergence.json"
    content = path.read_text(encoding="utf-8")
    measured = json.loads(content)["rows"][0]["mean_kl_nats"]
    changed = content.replace(f'"mean_kl_nats": {measured}', '"mean_kl_nats": 0.9999', 1)
    path.write_text(changed, encoding="utf-8")
    done = _check(root, "--check")
    assert done.returncode == 1
    assert "README.md: a table differs" in done.stderr
    assert _check(root).returncode == 0
    assert "0.9999" in (root / "README.md").read_text(encoding="utf-8")
    assert _check(root, "--check").returncode == 0


def test_an_unknown_table_is_named(tmp_path: Path) -> None:
    root = _copy(tmp_path)
    (root / "README.md").write_text("<!-- table: nonesuch -->\n<!-- end -->\n", encoding="utf-8")
    done = _check(root, "--check")
    assert done.returncode == 1
    assert "no table 'nonesuch'" in done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.json")), ids=lambda path: path.stem)
def test_a_result_says_where_it_comes_from(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert set(FACTS) <= set(found)
    assert found["title"]
    assert found["rows"]
    for owner in (found, *found["rows"]):
        for key in ("commit", "published_in"):
            assert owner.get(key) is None or re.fullmatch("[0-9a-f]{7,40}", owner[key]), (key, owner)
    for row in found["rows"]:
        known = [owner.get(key) for owner in (row, found) for key in ("commit", "published_in")]
        assert any(known), f"nobody can tell which code gave {row}: it needs the commit that was measured"


def test_every_table_is_on_a_page() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    shown = {name for page in pages for name in re.findall(r"<!-- table: ([\w-]+) -->", page.read_text("utf-8"))}
    sources = {path.stem for path in (ROOT / "results").glob("*.json")}
    described = set(re.findall(r'^    "([\w-]+)": Table\(', TABLES.read_text(encoding="utf-8"), re.MULTILINE))
    assert shown == described
    assert sources <= set(re.findall(r'Table\(\s*"([\w-]+)"', TABLES.read_text(encoding="utf-8")))


@pytest.mark.heavy
def test_the_figures_are_drawn(tmp_path: Path) -> None:
    script = ROOT / "docs" / "figures" / "make.py"
    subprocess.run([sys.executable, str(script), "--out", str(tmp_path)], check=True)
    drawn = {path.name for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name for path in script.parent.glob("*.svg")}
    pages = "".join(page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    assert all(name in pages for name in drawn)
