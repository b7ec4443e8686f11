"""Fills a folder with the files of a bundle.  What is there and right is kept.

There is no record of the progress: a chunk is there when its hash is right.  So a kill at any time, or a bad disk,
costs the chunks that are not right and no others.  Nothing is written but chunks whose hash was compared before.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from mbq_runtime.bundle.file_names import MANIFEST_NAME
from mbq_runtime.bundle.listed_files import Chunk, FileEntry
from mbq_runtime.bundle.manifest import Manifest
from mbq_runtime.errors import BundleError
from mbq_runtime.progress import Progress

from .files import Files, InterruptedFetchError

T = TypeVar("T")

MOST_TRIES = 5
"""A chunk that comes wrong so often is refused.  So is a source that breaks off so often without a chunk between."""
_PAUSE_S = 0.5  # before the first new try; twice as long before each one after it
_SPARE_BYTES = 16 << 20  # of disk that stay free
_READ_BYTES = 1 << 20


def needed_disk_bytes(folder: Path, manifest: Manifest) -> int:
    """Bytes of disk that the bundle's files take beyond what they take now.

    Args:
        folder: where the files are or will be.
        manifest: of the bundle.
    """
    needed = 0
    for entry in manifest.held_files:
        held = 0
        with suppress(OSError):
            held = os.lstat(folder / entry.name).st_blocks * 512
        needed += max(entry.size - held, 0)
    return needed


def check_disk(folder: Path, manifest: Manifest) -> None:
    """Refuse a bundle that does not fit.

    Args:
        folder: an existing folder, where the files are or will be.
        manifest: of the bundle.

    Raises:
        BundleError: the disk has too few free bytes.
    """
    needed, free = needed_disk_bytes(folder, manifest) + _SPARE_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        raise BundleError(
            f"{folder}: {free / 1e6:.0f} MB of disk are free, needed {needed / 1e6:.0f} MB for the bundle; free some, "
            "or choose a folder on another disk"
        )


def fill(
    files: Files,
    manifest: Manifest,
    folder: Path,
    progress: Progress | None = None,
    arrived: Callable[[int], object] | None = None,
    *,
    served: Manifest | None = None,
) -> int:
    """Fetch the chunks that are missing or wrong: first those that the lowest depth needs, then those of each next one.

    Each file has its whole size from the begin.  What has not come is a hole, which reads as zeros.

    Args:
        files: the bundle at its source.
        manifest: of the bundle.
        folder: an existing folder of this user.  Files in it that the manifest does not list stay.
        progress: called with (bytes that are right, bytes in all).
        arrived: called with a depth, 1-based, when all that it needs is there and right.  A bundle whose files mix the
            slices of all depths has one call, with 1.
        served: the manifest of what the source has, if that is more than ``manifest`` wants.

    Returns:
        Bytes that were fetched and were right.

    Raises:
        BundleError: the source does not have what the manifest says, breaks off too often, or a file cannot be written.
    """
    # Small files first: what is wrong with them is seen before the weights come.
    entries = sorted(manifest.held_files, key=lambda entry: entry.size)
    at_source = {entry.name: entry for entry in (served or manifest).held_files}
    missing = {entry.name: _at(folder, entry, _missing) for entry in entries}
    fetched, total = 0, manifest.total_bytes
    left = sum(chunk.end - chunk.begin for chunks in missing.values() for chunk in chunks)
    report = progress or (lambda done, total: None)
    report(total - left, total)

    for depth in range(1, (manifest.deepest if len(manifest.parts) > 1 else 1) + 1):
        needed = manifest.needed_bytes(depth)
        for entry in entries:
            wanted = [chunk for chunk in missing[entry.name] if chunk.begin < needed[entry.name]]
            missing[entry.name] = missing[entry.name][len(wanted) :]

            def save(descriptor: int, entry: FileEntry, wanted: list[Chunk] = wanted) -> None:
                nonlocal fetched
                for chunk, content in _fetched(files, at_source[entry.name], wanted):
                    _write(descriptor, content, chunk.begin)
                    fetched += len(content)
                    report(total - left + fetched, total)
                os.fsync(descriptor)

            if wanted:
                _at(folder, entry, save)
        if arrived is not None:
            arrived(depth)
    return fetched


def _at(folder: Path, entry: FileEntry, work: Callable[[int, FileEntry], T]) -> T:
    """What ``work`` returns for the open file."""
    try:
        descriptor = _opened(folder, entry)
        try:
            return work(descriptor, entry)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise BundleError(
            f"{folder / entry.name}: cannot be written ({error.strerror}); free some disk, or choose another folder"
        ) from None


def _opened(folder: Path, entry: FileEntry) -> int:
    """A descriptor of the file, which has its size.  No link is followed."""
    path = folder / entry.name
    for parent in reversed(path.relative_to(folder).parents[:-1]):
        (folder / parent).mkdir(exist_ok=True)
        if (folder / parent).is_symlink():
            raise BundleError(f"{folder / parent}: a symbolic link, needed a folder; remove it")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    if os.fstat(descriptor).st_size != entry.size:
        os.ftruncate(descriptor, entry.size)
    return descriptor


def _missing(descriptor: int, entry: FileEntry) -> list[Chunk]:
    """The chunks that are not there or not right."""
    return [
        chunk
        for chunk in entry.ranges()
        if not _has_data(descriptor, chunk) or _hash(descriptor, chunk) != chunk.sha256
    ]


def _has_data(descriptor: int, chunk: Chunk) -> bool:
    """Whether the disk holds bytes of the chunk.  What was never written is not read."""
    try:
        return os.lseek(descriptor, chunk.begin, os.SEEK_DATA) < chunk.end
    except OSError as error:
        return error.errno != errno.ENXIO  # nothing was written from there on


def _hash(descriptor: int, chunk: Chunk) -> str:
    found = sha256()
    for begin in range(chunk.begin, chunk.end, _READ_BYTES):
        found.update(os.pread(descriptor, min(_READ_BYTES, chunk.end - begin), begin))
    return found.hexdigest()


def _write(descriptor: int, content: bytes, begin: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, begin)
        view, begin = view[written:], begin + written


def _fetched(files: Files, entry: FileEntry, missing: list[Chunk]) -> Iterator[tuple[Chunk, bytes]]:
    """Each missing chunk with its content, which has the right hash."""
    wrong, breaks = Counter[Chunk](), 0
    while missing:
        left: list[Chunk] = []
        problem = ""
        for span in _spans(missing):
            came = 0
            try:
                with files.blocks(entry, span[0].begin, span[-1].end) as blocks:
                    for chunk, content in _chunks(blocks, span):
                        came += 1
                        if sha256(content).hexdigest() == chunk.sha256:
                            breaks = 0
                            yield chunk, content
                            continue
                        left.append(chunk)
                        wrong[chunk] += 1
                        if wrong[chunk] == MOST_TRIES:
                            raise _wrong(entry, chunk)
                if came < len(span):
                    problem = f"{entry.name}: the source ended early"
            except InterruptedFetchError as error:
                problem = str(error)
            left += span[came:]
        missing = sorted(left)
        if problem:
            breaks += 1
            if breaks == MOST_TRIES:
                raise BundleError(
                    f"{problem}; {MOST_TRIES} tries failed; run the same command later, it goes on from here"
                )
            time.sleep(_PAUSE_S * 2 ** (breaks - 1))


def _wrong(entry: FileEntry, chunk: Chunk) -> BundleError:
    return BundleError(
        f"{entry.name}: bytes {chunk.begin} to {chunk.end} came {MOST_TRIES} times with another hash than the "
        "manifest's; the source is damaged, or another changed it on the way; tell its maker"
    )


def _spans(chunks: list[Chunk]) -> Iterator[list[Chunk]]:
    """Runs of chunks without a gap, each of which is one request."""
    span: list[Chunk] = []
    for chunk in chunks:
        if span and span[-1].end != chunk.begin:
            yield span
            span = []
        span.append(chunk)
    if span:
        yield span


def _chunks(blocks: Iterator[bytes], span: list[Chunk]) -> Iterator[tuple[Chunk, bytes]]:
    """The chunks of a stream of bytes.  A chunk that did not come whole is left out."""
    held = bytearray()
    waiting = iter(span)
    chunk = next(waiting)
    for block in blocks:
        held += block
        while len(held) >= chunk.end - chunk.begin:
            size = chunk.end - chunk.begin
            yield chunk, bytes(held[:size])
            del held[:size]
            following = next(waiting, None)
            if following is None:
                return
            chunk = following


def remove_unlisted(folder: Path, manifest: Manifest, kept: tuple[str, ...] = ()) -> None:
    """Remove from an unfinished bundle what its manifest does not list.

    Args:
        folder: of the unfinished bundle.
        manifest: of the bundle.
        kept: more names that stay.
    """
    listed = {entry.name for entry in manifest.files} | {MANIFEST_NAME, *kept}
    for path in sorted(folder.rglob("*"), reverse=True):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):  # it holds files that stay
                path.rmdir()
        elif name not in listed:
            path.unlink()
