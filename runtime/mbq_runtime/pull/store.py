"""The bundles in the cache folder: ``bundles/NAME``, or ``bundles/.NAME.part`` until all of a bundle is there."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mbq_runtime.bundle.file_names import MANIFEST_NAME
from mbq_runtime.bundle.manifest import Manifest, read
from mbq_runtime.cache import cache_dir
from mbq_runtime.errors import BundleError, UsageError
from mbq_runtime.locks import locked
from mbq_runtime.trust.pulled import UNKNOWN, pulled_from

from .sources import Source, is_source


@dataclass(frozen=True)
class Kept:
    """A bundle in the cache folder.

    name: what ``mbq rm`` takes.
    folder: of the bundle, or of its unfinished files.
    source: where it came from.
    manifest: None if it cannot be read.
    whole: whether all files are there.
    """

    name: str
    folder: Path
    source: str
    manifest: Manifest | None
    whole: bool

    @property
    def disk_bytes(self) -> int:
        """Bytes of disk that the files take."""
        return sum(path.lstat().st_blocks * 512 for path in self.folder.rglob("*") if path.is_file())


def bundles_dir() -> Path:
    """The folder of pulled bundles."""
    return cache_dir() / "bundles"


def draft_of(folder: Path) -> Path:
    """Where the files of a bundle are until it is whole.

    Args:
        folder: of the whole bundle.
    """
    return folder.with_name(f".{folder.name}.part")


def old_of(folder: Path) -> Path:
    """Where an older bundle is while the new one is put in its place.

    Args:
        folder: of the bundle.
    """
    return folder.with_name(f".{folder.name}.old")


def end_swap(folder: Path) -> None:
    """Mend what a kill left between the renames of a replacement: the older bundle comes back, or is removed.

    Args:
        folder: of the bundle, whose name is locked.
    """
    old = old_of(folder)
    with suppress(OSError):
        if old.lstat().st_uid != os.geteuid():
            return
        if old.is_symlink():
            old.unlink()
        elif not os.path.lexists(folder) and (old / MANIFEST_NAME).is_file():
            os.rename(old, folder)
        else:
            shutil.rmtree(old)


def _end_swaps() -> None:
    """Mend what kills left in the cache folder.  A bundle that is being pulled is left alone."""
    for old in bundles_dir().glob(".*.old"):
        folder = old.with_name(old.name[1 : -len(".old")])
        with suppress(UsageError, BundleError), locked(folder, "mbq pull", "another bundle"):
            end_swap(folder)


def listed() -> list[Kept]:
    """The bundles in the cache folder, by name."""
    found = []
    with suppress(FileNotFoundError):
        _end_swaps()
        for folder in sorted(bundles_dir().iterdir()):
            whole = not folder.name.startswith(".")
            if folder.is_dir() and (whole or folder.suffix == ".part"):
                found.append(_kept(folder, whole))
    return sorted(found, key=lambda kept: (kept.name, kept.whole))


def _kept(folder: Path, whole: bool) -> Kept:
    name = folder.name if whole else folder.name[1 : -len(".part")]
    try:
        return Kept(name, folder, pulled_from(folder) or UNKNOWN, read(folder), whole)
    except BundleError:
        return Kept(name, folder, UNKNOWN, None, whole)


def remove(text: str) -> list[Kept]:
    """Remove a bundle from the cache folder, with what is unfinished of it.

    Args:
        text: the bundle's name, or its source.

    Returns:
        What was removed.

    Raises:
        UsageError: the cache folder has no such bundle, or it is being pulled.
        BundleError: it cannot be removed.
    """
    name = Source.of(text, allow_http=True).name if is_source(text) else text
    found = [kept for kept in listed() if kept.name == name]
    if not found:
        raise UsageError(f"{text}: no such bundle in {bundles_dir()}; mbq list shows their names")
    with locked(bundles_dir() / name, "mbq pull", "another bundle"):
        for kept in found:
            try:
                shutil.rmtree(kept.folder)
            except OSError as error:
                raise BundleError(f"{error.filename}: cannot be removed ({error.strerror})") from None
    return found
