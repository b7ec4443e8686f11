"""What the wheel carries of the page is what the sources give, and it is small."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
from pathlib import Path

import needs
import nodes

SITE = nodes.REPO / "runtime/mbq_runtime/web/site"
MOST_BYTES = 300_000


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_shipped_page_is_what_the_sources_give(tmp_path: Path) -> None:
    command = [needs.program("node"), str(nodes.packages() / "build.mjs"), str(tmp_path / "site")]
    subprocess.run(command, check=True, timeout=120)
    made, shipped = files(tmp_path / "site"), files(SITE)
    assert made.keys() == shipped.keys()
    assert [name for name in made if made[name] != shipped[name]] == [], "make web"


def test_it_is_small_and_names_no_other_host() -> None:
    shipped = files(SITE)
    assert sum(len(gzip.compress(content)) for content in shipped.values()) < MOST_BYTES
    assert "default-src 'self'" in shipped["index.html"].decode()
    code = b"".join(content for name, content in shipped.items() if name != "licenses.txt")
    assert set(re.findall(rb"https?://[\w.-]+", code)) == {b"http://www.w3.org"}  # the name space of the icon


def test_the_worker_keeps_all_of_the_page() -> None:
    worker = (SITE / "worker.js").read_text(encoding="utf-8")
    kept = json.loads(worker.partition("FILES = ")[2].partition(";")[0])
    names = {path.name for path in SITE.iterdir()} - {"index.html", "worker.js"}
    assert set(kept) == {"./", "app.json", *names}


def test_packages_are_pinned() -> None:
    package = json.loads((nodes.WEB / "package.json").read_text(encoding="utf-8"))
    lock = json.loads((nodes.WEB / "package-lock.json").read_text(encoding="utf-8"))
    for name, version in (package["dependencies"] | package["devDependencies"]).items():
        assert lock["packages"][f"node_modules/{name}"]["version"] == version
        assert lock["packages"][f"node_modules/{name}"]["integrity"]
