"""Where the bytes of each depth lie in a file of weights.

A file holds first what depth 1 reads, then what depth 2 reads besides, and so on.  Each part begins on a page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from mbq_runtime.bundle.listed_files import FileRange


def ranges(
    path: Path, places: Mapping[str, int], depths: Mapping[str, int], count: int, name: str | None = None
) -> list[FileRange]:
    """The range of each depth in one file.

    Args:
        path: the file.
        places: where each tensor begins, in bytes, by name.
        depths: the first depth that reads a tensor, by name; 1 for a tensor that is not named.
        count: how many depths there are.
        name: of the file, relative to the bundle; None for a file that lies beside the manifest.
    """
    size = path.stat().st_size
    begins = [0]
    for depth in range(2, count + 1):
        begins.append(min((place for key, place in places.items() if depths.get(key, 1) >= depth), default=size))
    return [FileRange(name or path.name, begin, end) for begin, end in zip(begins, [*begins[1:], size], strict=True)]


def joined(files: Iterable[list[FileRange]]) -> tuple[tuple[FileRange, ...], ...]:
    """``parts`` of the manifest: the ranges of all files, by depth.

    Args:
        files: for each file the range of each depth.
    """
    return tuple(zip(*files, strict=True))
