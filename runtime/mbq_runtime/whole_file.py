"""Files that are written whole or not at all: power fails on a board, and two processes share a cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write.  It takes its place when the block ends; if the block fails, the old file stays.

    Args:
        path: the file; its folder is there.

    Raises:
        OSError: it cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all.

    Args:
        path: the file; its folder is there.
        content: of the file.

    Raises:
        OSError: it cannot be written.
    """
    with whole_file(path) as file:
        file.write(content)
