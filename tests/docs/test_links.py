"""Links between the pages lead somewhere, and the README stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import PAGES, ROOT

MOST_README_LINES = 150


def _headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        if not there.exists() or (anchor and anchor not in _headings(there)):
            broken.append(target)
    assert not broken, f"{page.relative_to(ROOT)}: {', '.join(broken)}"


def test_every_page_is_linked() -> None:
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s]+\.md[^)\s]*)\)", page.read_text(encoding="utf-8"))
    }
    assert set(PAGES) - linked == {ROOT / "README.md"}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MOST_README_LINES


def test_named_modules_exist() -> None:
    """Paths of Python files in the text: from the repository, from a package, or from the kernels' package."""
    roots = [ROOT, ROOT / "runtime", ROOT / "targets", ROOT / "targets" / "mbq_targets"]
    named = {
        (page.relative_to(ROOT).as_posix(), path)
        for page in PAGES
        for path in re.findall(r"`([\w./-]+/[\w.-]+\.py)`", page.read_text(encoding="utf-8"))
    }
    assert len(named) > 10
    missing = sorted(f"{page}: {path}" for page, path in named if not any((root / path).exists() for root in roots))
    assert not missing
