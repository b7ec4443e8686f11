"""The files that a manifest lists: their sizes, hashes and chunks, and the ranges that each depth needs.

A large file has a hash for each chunk of it, so that a reader can check and fetch each chunk alone.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from ..errors import BundleError
from .file_names import COMMON_FILES, ENGINE_FILES, MANIFEST_NAME, SIGNATURE_NAME, TRIM_NAME, WEIGHT_FILES
from .layout import PAGE_BYTES
from .reading import shown

CHUNK_BYTES = 4 << 20
"""A file larger than this has a hash for each chunk of this size.  The last chunk may be shorter."""
_LONGEST_NAME = 255  # characters
_SHA256 = re.compile("[0-9a-f]{64}")


class Chunk(NamedTuple):
    """A range of a file that has its own hash.

    begin, end: bytes of the file, without ``end``.
    sha256: 64 hexadecimal digits.
    """

    begin: int
    end: int
    sha256: str


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle.

    name: POSIX path relative to the folder.
    size: bytes.
    sha256: 64 hexadecimal digits.
    chunks: sha256 of each ``CHUNK_BYTES`` of the file in order; empty for a file of one chunk.
    """

    name: str
    size: int
    sha256: str
    chunks: tuple[str, ...] = ()

    def ranges(self) -> Iterator[Chunk]:
        """The chunks of the file in order.  A small file is one chunk, an empty file has none."""
        hashes = self.chunks or (self.sha256,)
        for begin in range(0, self.size, CHUNK_BYTES):
            yield Chunk(begin, min(begin + CHUNK_BYTES, self.size), hashes[begin // CHUNK_BYTES])

    def first(self, needed: int) -> FileEntry:
        """The entry of a file that has only the first chunks: those with the bytes that are needed.

        ``sha256`` is still that of the whole file.

        Args:
            needed: bytes.
        """
        count = -(-needed // CHUNK_BYTES)
        return replace(self, size=min(self.size, count * CHUNK_BYTES), chunks=self.chunks[:count])


@dataclass(frozen=True)
class FileRange:
    """A range of a file of weights.

    name: of the file.
    begin, end: bytes of the file, without ``end``.  Both are on a page, but the end of the file need not be.
    """

    name: str
    begin: int
    end: int


def file_entries(folder: str | os.PathLike[str]) -> tuple[FileEntry, ...]:
    """Size and hash of every file but the manifest, its signature and ``trim.json``, sorted by name.

    Args:
        folder: folder of the bundle.
    """
    folder = Path(folder)
    entries = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in (MANIFEST_NAME, SIGNATURE_NAME, TRIM_NAME):
            entries.append(_entry(path, name))
    return tuple(entries)


def _entry(path: Path, name: str) -> FileEntry:
    whole, chunks, size = sha256(), [], 0
    with path.open("rb") as file:
        while block := file.read(CHUNK_BYTES):
            whole.update(block)
            chunks.append(sha256(block).hexdigest())
            size += len(block)
    return FileEntry(name, size, whole.hexdigest(), tuple(chunks) if size > CHUNK_BYTES else ())


def check_entries(files: Sequence[FileEntry], engines: Sequence[str], layout: str, path: Path | str) -> None:
    """Check the entries of a manifest.

    Args:
        files: the entries.
        engines: keys of ``ENGINE_FILES``.
        layout: of the weights.
        path: the manifest, for messages.

    Raises:
        BundleError: an entry has a value that it cannot have, or a file is there twice, or one is missing.
    """
    rules: list[tuple[bool, str, object, str]] = [
        *(
            (
                _is_inside(entry.name),
                "files",
                entry.name,
                f"names relative to the bundle, without .., of at most {_LONGEST_NAME} letters",
            )
            for entry in files
        ),
        *(
            (
                entry.size >= 0 and _is_sha256(entry.sha256),
                f"files {entry.name}",
                f"{entry.size}, {entry.sha256!r}",
                "a size in bytes and 64 hexadecimal digits",
            )
            for entry in files
        ),
        *(
            (
                len(entry.chunks) == _chunk_count(entry.size) and all(map(_is_sha256, entry.chunks)),
                f"files {entry.name} chunks",
                f"{len(entry.chunks)} hashes",
                f"{_chunk_count(entry.size)} of 64 hexadecimal digits",
            )
            for entry in files
        ),
    ]
    for holds, field, seen, needed in rules:
        if not holds:
            raise BundleError(f"{path}: {field} is {shown(seen)}, needed {needed}; export the bundle again")
    names = Counter(entry.name for entry in files)
    twice = [name for name, count in names.items() if count > 1]
    needed_files = [*COMMON_FILES, *(name for e in engines for name in ENGINE_FILES[e][layout])]
    missing = [name for name in needed_files if name not in names]
    if twice or missing:
        problem = f"lists {twice[0]} twice" if twice else f"does not list {missing[0]}"
        raise BundleError(f"{path}: files {problem}; export the bundle again")


def _chunk_count(size: int) -> int:
    """Hashes of chunks that a file of this size has."""
    return -(-size // CHUNK_BYTES) if size > CHUNK_BYTES else 0


def check_parts(
    parts: tuple[tuple[FileRange, ...], ...], files: Sequence[FileEntry], depths: int, path: Path | str
) -> None:
    """Check that the parts cut each weight file into ranges without a gap, which begin on a page.

    Args:
        parts: of a manifest.
        files: of the manifest.
        depths: of the bundle's slices.
        path: the manifest, for messages.

    Raises:
        BundleError: they do not.
    """
    if len(parts) not in (0, 1, depths):
        raise BundleError(f"{path}: parts has {len(parts)} depths, needed 1 or {depths}; export the bundle again")
    sizes = {entry.name: entry.size for entry in files if entry.name in WEIGHT_FILES}
    ends = dict.fromkeys(sizes, 0)
    for found in (found for part in parts for found in part):
        begin = ends.get(found.name)
        last = found.end == sizes.get(found.name)
        if begin is None or found.begin != begin or found.end < begin or not (last or found.end % PAGE_BYTES == 0):
            raise BundleError(
                f"{path}: parts has bytes {found.begin} to {found.end} of {shown(found.name)}, needed a range of a "
                f"weight file that begins at {begin or 0} and ends on a page of {PAGE_BYTES} bytes; "
                "export the bundle again"
            )
        ends[found.name] = found.end
    for name, end in ends.items() if parts else ():
        if end != sizes[name]:
            raise BundleError(
                f"{path}: parts ends at byte {end} of {name}, needed {sizes[name]}; export the bundle again"
            )


def _is_inside(name: str) -> bool:
    """Whether a name stays in the bundle on every system, and is not that of the manifest."""
    return (
        len(name) <= _LONGEST_NAME
        and not {"", ".", ".."} & set(name.split("/"))
        and name not in (MANIFEST_NAME, SIGNATURE_NAME, TRIM_NAME)
        and name.isprintable()
        and not any(c in name for c in "\\:")
    )


def _is_sha256(text: str) -> bool:
    return _SHA256.fullmatch(text) is not None
