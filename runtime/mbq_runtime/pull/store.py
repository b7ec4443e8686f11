"""The bundles in the cache folder, and the marks of what was pulled.

``bundles/NAME`` is a whole bundle, ``bundles/.NAME.part`` one that is not whole yet.  ``pulled/HASH.json`` marks each
bundle that came from elsewhere, by the SHA-256 of its manifest: the mark stays when the folder is moved or removed.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from mbq_runtime.bundle.manifest import MANIFEST_NAME, MOST_MANIFEST_BYTES, Manifest, parse
from mbq_runtime.bundle.reading import parse_json, read_file
from mbq_runtime.cache import cache_dir
from mbq_runtime.errors import BundleError, UsageError
from mbq_runtime.locks import locked

from .sources import Source, is_source

_MOST_MARK_BYTES = 1 << 16


@dataclass(frozen=True)
class Kept:
    """A bundle in the cache folder.

    name: what ``mbq rm`` takes.
    folder: of the bundle, or of its unfinished files.
    source: where it came from; "" if unknown.
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


def listed() -> list[Kept]:
    """The bundles in the cache folder, by name."""
    found = []
    with suppress(FileNotFoundError):
        for folder in sorted(bundles_dir().iterdir()):
            whole = not folder.name.startswith(".")
            if folder.is_dir() and (whole or folder.suffix == ".part"):
                found.append(_kept(folder, whole))
    return sorted(found, key=lambda kept: (kept.name, kept.whole))


def _kept(folder: Path, whole: bool) -> Kept:
    name = folder.name if whole else folder.name[1 : -len(".part")]
    try:
        content = read_file(folder / MANIFEST_NAME, MOST_MANIFEST_BYTES)
        return Kept(name, folder, _source(content), parse(content, folder / MANIFEST_NAME), whole)
    except BundleError:
        return Kept(name, folder, "", None, whole)


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


def mark_pulled(content: bytes, source: str) -> None:
    """Remember that a bundle came from elsewhere.

    Args:
        content: of its manifest.
        source: where it came from.

    Raises:
        BundleError: the cache folder cannot be written.
    """
    path = _mark(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_text(json.dumps({"source": source}) + "\n", encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        raise BundleError(
            f"{path}: cannot be written ({error.strerror}); set MBQ_CACHE_DIR to a folder that can"
        ) from None


def pulled_from(folder: Path) -> str | None:
    """Where a bundle was pulled from; None for one that was not pulled on this machine.

    Args:
        folder: of the bundle.

    Raises:
        BundleError: the manifest cannot be read.
    """
    content = read_file(folder / MANIFEST_NAME, MOST_MANIFEST_BYTES)
    return (_source(content) or "unknown") if os.path.lexists(_mark(content)) else None


def _mark(content: bytes) -> Path:
    return cache_dir() / "pulled" / f"{sha256(content).hexdigest()}.json"


def _source(content: bytes) -> str:
    try:
        document = parse_json(read_file(_mark(content), _MOST_MARK_BYTES))
    except (BundleError, ValueError):
        return ""
    source = document.get("source") if isinstance(document, dict) else None
    return source if isinstance(source, str) else ""
