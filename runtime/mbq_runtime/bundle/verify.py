"""Compares the files in a bundle's folder with its manifest.

An engine finds truncated files with ``check_sizes`` before it opens one.  ``verify`` compares the hash of every file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ..errors import BundleError
from ..progress import Progress
from .file_names import DOWNLOAD_RECORDS, MANIFEST_NAME, PAPERS, SIGNATURE_NAME, TRIM_NAME
from .listed_files import FileEntry
from .manifest import Manifest, read
from .reading import check_regular, open_file

_BLOCK_BYTES = 1 << 18  # read at a time: small enough for the cache of a processor
_FREE = (*PAPERS, SIGNATURE_NAME, TRIM_NAME)


def check_sizes(folder: str | os.PathLike[str], manifest: Manifest) -> None:
    """Check that every listed file is there, is a regular file, and has its size.  No file is opened.

    Args:
        folder: folder of the bundle.
        manifest: the bundle's manifest.

    Raises:
        BundleError: a file is missing, has another size, or is a link, a pipe or a device.
    """
    folder = Path(folder)
    for parent in sorted({str(parent) for entry in manifest.files for parent in PurePosixPath(entry.name).parents}):
        if parent != "." and (folder / parent).is_symlink():
            raise BundleError(f"{folder / parent}: a symbolic link, needed a folder; copy the bundle with cp -rL")
    for entry in manifest.held_files:
        path = folder / entry.name
        size = check_regular(path)
        if size != entry.size:
            raise BundleError(
                f"{path}: {size} bytes long where the manifest says {entry.size}: an incomplete copy; "
                "copy the bundle again"
            )


def check_unlisted(folder: str | os.PathLike[str], manifest: Manifest) -> None:
    """Refuse what the manifest does not list: an engine or tokenizer could read it.

    ``PAPERS``, the signature and ``DOWNLOAD_RECORDS`` are let through.

    Args:
        folder: folder of the bundle.
        manifest: the bundle's manifest.

    Raises:
        BundleError: there is a file, link, pipe or device that the manifest does not list.
    """
    listed = {entry.name for entry in manifest.files} | {MANIFEST_NAME}
    folders = [""]
    while folders:
        place = folders.pop()
        try:
            with os.scandir(Path(folder) / place) as found:
                for item in found:
                    name = place + item.name
                    if item.is_dir(follow_symlinks=False):
                        folders.append(f"{name}/")
                    elif name not in listed and not (_is_harmless(name) and item.is_file(follow_symlinks=False)):
                        raise BundleError(
                            f"{item.path}: not listed in the manifest; remove it, or export the bundle again"
                        )
        except OSError as error:
            raise BundleError(f"{error.filename}: cannot be read ({error.strerror}); copy the bundle again") from None


def verify(folder: str | os.PathLike[str], progress: Progress | None = None) -> Manifest:
    """Compare the size and hash of every file with the manifest.

    Args:
        folder: folder of the bundle.
        progress: called with (bytes done, bytes in all).

    Returns:
        The manifest.

    Raises:
        BundleError: a file is missing, differs, or is not listed.
    """
    folder = Path(folder)
    manifest = read(folder)
    check_sizes(folder, manifest)
    check_unlisted(folder, manifest)
    done = 0

    def count(read_bytes: int) -> None:
        nonlocal done
        done += read_bytes
        if progress is not None:
            progress(done, manifest.total_bytes)

    for entry, held in zip(manifest.files, manifest.held_files, strict=True):
        path = folder / entry.name
        try:
            with open_file(path) as file:
                _check_hashes(path, file, held, count, whole=held == entry)
        except OSError as error:
            raise BundleError(f"{path}: cannot be read ({error.strerror})") from None
    return manifest


def _check_hashes(path: Path, file: BinaryIO, entry: FileEntry, count: Callable[[int], None], *, whole: bool) -> None:
    """whole: whether all of the file is there, so that its own hash can be compared."""
    together = sha256()
    for chunk in entry.ranges():
        found = sha256()
        for begin in range(chunk.begin, chunk.end, _BLOCK_BYTES):
            block = file.read(min(_BLOCK_BYTES, chunk.end - begin))
            found.update(block)
            together.update(block)
            count(len(block))
        if entry.chunks:
            _check_hash(path, found.hexdigest(), chunk.sha256, f"bytes {chunk.begin} to {chunk.end} differ")
    if whole:
        _check_hash(path, together.hexdigest(), entry.sha256, "its contents differ")


def _check_hash(path: Path, found: str, needed: str, what: str) -> None:
    if found != needed:
        raise BundleError(
            f"{path}: {what} from the manifest (sha256 {found[:12]}..., needed {needed[:12]}...); "
            "copy, pull or export the bundle again"
        )


def _is_harmless(name: str) -> bool:
    return name in _FREE or DOWNLOAD_RECORDS.fullmatch(name) is not None
