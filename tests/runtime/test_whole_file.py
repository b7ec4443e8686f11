"""A file is the new one or the old one, whatever happens while it is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mbq_runtime.whole_file import whole_file, write_whole


def test_the_file_has_the_content_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_whole(path, b"first, and longer")
    write_whole(path, b"second")
    assert path.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_stays_when_the_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_whole(path, b"old")
    with pytest.raises(TypeError), whole_file(path) as file:
        file.writelines([b"half of", "the file"])  # type: ignore[list-item]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_stays_when_the_process_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_whole(path, b"old")
    script = (
        "import os, pathlib, signal\n"
        "from mbq_runtime.whole_file import whole_file\n"
        f"with whole_file(pathlib.Path({str(path)!r})) as file:\n"
        "    file.write(b'half of')\n"
        "    file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode < 0
    assert path.read_bytes() == b"old"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "none" / "file.json", b"new")
