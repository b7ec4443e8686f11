"""The commands that the pages give for a board, typed into the shell of an emulated one.

The wheels lie in a folder, because an emulated board has no index.  What a command needs of root, or of the
workstation, is there already.
"""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pages
import pytest
from board_packages import REPO, call
from tiny_bundle import write_bundle
from userland import Userland

pytestmark = pytest.mark.slow

ELSEWHERE = ("sudo ", "scp ", "python3 -m http.server")
"""Commands that need root, or that run on the workstation."""


def under(page: str, title: str) -> list[str]:
    """The commands of a page that stand below a heading or a bold title, up to the next of its kind."""
    path = REPO / "docs" / page
    lines, mark = path.read_text(encoding="utf-8").splitlines(), title[:2]
    first = next(i for i, line in enumerate(lines, 1) if line.startswith(title))
    last = next((i for i, line in enumerate(lines, 1) if i > first and line.startswith((mark, "## "))), len(lines))
    found = [block for block in pages.blocks(path) if first < block.line < last and block.language in pages.SHELL]
    return [line for block in found for line in pages.commands(block) if not line.startswith(ELSEWHERE)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's own wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    for name in ("mbq_export", "runtime", "targets"):
        shutil.copytree(REPO / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, copy)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    call([*build, "--wheel-dir", folder, copy], "build the wheel")
    (found,) = folder.glob("mbq_export-*.whl")
    return found


@pytest.fixture
def home(wheel: Path, tmp_path: Path) -> Path:
    """The home folder of a board that has the wheel and a bundle."""
    folder = tmp_path / "home"
    folder.mkdir()
    shutil.copy(wheel, folder)
    write_bundle(folder / "MODEL-arm64")
    return folder


@pytest.fixture
def workstation(home: Path, tmp_path: Path) -> Iterator[str]:
    """HOST:PORT of a server of plain files that has the bundle."""
    shutil.copytree(home / "MODEL-arm64", tmp_path / "bundles" / "smollm2-135m-arm64")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "bundles"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_a_board_installs_pulls_and_runs(userland: Userland, home: Path, workstation: str) -> None:
    install = under("on-the-board.md", "**Raspberry Pi OS, Debian, Ubuntu.**")
    first = under("getting-started.md", "## Board: install and run")
    pull = [line for line in under("on-the-board.md", "## Pull a bundle") if "WORKSTATION" in line]
    assert install == first[: len(install)]
    assert [line.split()[:2] for line in first[len(install) : len(install) + 2]] == [["mbq", "verify"], ["mbq", "run"]]
    assert len(pull) == 1
    commands = first[: len(install) + 2] + [line.replace("WORKSTATION:8000", workstation) for line in pull]
    done = userland.type([*commands, "mbq list", "uname -m"], home)
    assert done.returncode == 0, done.stderr + done.stdout
    pulled = [path for path in (home / ".cache/mbq-export/bundles").iterdir() if (path / "manifest.json").is_file()]
    assert len(pulled) == 1
    assert str(pulled[0].name) in done.stdout
    assert done.stdout.splitlines()[-1] == "aarch64"
    print(done.stdout[-1500:])
