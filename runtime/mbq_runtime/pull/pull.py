"""Pulls a bundle: from a source into a folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mbq_runtime.bundle.check import check_bundle
from mbq_runtime.bundle.file_names import MANIFEST_NAME, SIGNATURE_NAME, TRIM_NAME
from mbq_runtime.bundle.manifest import MOST_MANIFEST_BYTES, MOST_TRIM_BYTES, Manifest, limited, parse, read, trim_text
from mbq_runtime.bundle.reading import read_file
from mbq_runtime.errors import BundleError, UsageError
from mbq_runtime.locks import locked, place_behind_links
from mbq_runtime.progress import Progress
from mbq_runtime.trust import signature
from mbq_runtime.trust.pulled import mark_pulled, pulled_from

from .fetch import check_disk, fill, remove_unlisted
from .files import Files, FolderFiles, InterruptedFetchError
from .sources import Source, is_source
from .store import bundles_dir, draft_of, end_swap, old_of


@dataclass(frozen=True)
class Pulled:
    """A whole bundle of this machine.

    folder: of the bundle.
    manifest: of the bundle.
    fetched_bytes: what came from the source now.
    """

    folder: Path
    manifest: Manifest
    fetched_bytes: int


def place_of(source: Source) -> Path:
    """The folder of a source's bundle in the cache.  It need not exist.

    Args:
        source: of the bundle.
    """
    return bundles_dir() / source.name


def pull(
    source: Source,
    folder: Path | None = None,
    *,
    allow_http: bool = False,
    key: Path | None = None,
    max_bits: float | None = None,
    progress: Progress | None = None,
    arrived: Callable[[int, Path], object] | None = None,
) -> Pulled:
    """Fetch a bundle, or what is missing of it.  The folder appears when the bundle is whole.

    A bundle that is there is compared with the source.  Chunks that are not right are fetched again.  A link stays:
    what it leads to is replaced.

    Args:
        source: of the bundle.
        folder: where it goes, or a link to it; None for the cache folder.
        allow_http: whether an http server may be another machine.
        key: file of the maker's public key; None: the bundle need not be signed.
        max_bits: fetch only the depths of at most so many bits per weight; None for all that the source has.
        progress: called with (bytes that are right, bytes in all).
        arrived: called with (depth, folder of the unfinished bundle) when all that the depth needs is there.  It is not
            called where an older bundle is replaced.

    Raises:
        UsageError: the folder is in use or is no bundle, no depth has so few bits, or the source or the key may not be
            used.
        BundleError: the source has no bundle, a broken one or one that the key has not signed, or the disk is full.
    """
    folder = place_behind_links(place_of(source) if folder is None else Path(os.path.expanduser(folder)))
    if os.path.lexists(folder) and not os.path.isfile(folder / MANIFEST_NAME):
        raise UsageError(f"{folder}: it exists and is not a bundle; choose another folder")
    with source.files(allow_http=allow_http) as files:
        offer = _offer(source.text, files)
        if key is not None:
            signature.check(offer.content, offer.signature, key, source.text)
        manifest = limit(offer.manifest, max_bits)
        with locked(folder, "another mbq", "another folder"):
            end_swap(folder)
            mark_pulled(offer.content, source.text)
            return _pulled(files, folder, offer, manifest, progress, arrived)


def trim(bundle: Path, folder: Path, max_bits: float, progress: Progress | None = None) -> Pulled:
    """Copy a bundle without its deeper slices.  The folder appears when the copy is whole and its hashes are right.

    The manifest and its signature stay as they are: they have a hash for each chunk that is left.

    Args:
        bundle: folder of the bundle.
        folder: of the copy; it must not exist.
        max_bits: the depths of at most so many bits per weight stay.
        progress: called with (bytes that are right, bytes in all).

    Raises:
        UsageError: the folder exists, no depth has so few bits, or none has more.
        BundleError: the bundle is broken or its weights are not divided by depth, or the disk is full.
    """
    if folder.exists():
        raise UsageError(f"{folder}: it exists; choose another folder")
    folder = place_behind_links(folder)
    if folder.is_symlink():
        raise UsageError(f"{folder}: its links lead to themselves; choose another folder")
    read(bundle)  # it says best what is wrong with a folder
    files = FolderFiles(bundle)
    offer = _offer(str(bundle), files)
    manifest = limit(offer.manifest, max_bits)
    if manifest == offer.manifest:
        most = offer.manifest.budget.max_bits
        raise UsageError(f"--max-bits {max_bits:g}: the bundle has no depth of more bits, its most are {most:g}")
    with locked(folder, "another mbq", "another folder"):
        return _pulled(files, folder, offer, manifest, progress, None)


def limit(manifest: Manifest, max_bits: float | None) -> Manifest:
    """The manifest of a bundle without the depths of more bits.

    Args:
        manifest: of the bundle.
        max_bits: most bits per weight; None for all.

    Raises:
        UsageError: no depth has so few bits.
        BundleError: the weights are not divided by depth.
    """
    if max_bits is None:
        return manifest
    bits = manifest.profile.depth_bits
    depth = sum(held <= max_bits for held in bits)
    if not depth:
        shown = ", ".join(map(str, bits))
        raise UsageError(f"--max-bits {max_bits:g}: the bundle has depths of {shown} bits; give at least {bits[0]}")
    return manifest.limited(min(depth, manifest.deepest))


def local_folder(text: str) -> Path:
    """The folder of a bundle.  A source is pulled into the cache folder, unless its bundle is there.

    Args:
        text: a folder, or a source such as hf:OWNER/NAME.

    Raises:
        UsageError, BundleError: as ``pull``.
    """
    if not is_source(text):
        return Path(text)
    source = Source.of(text)
    folder = place_of(source)
    return folder if folder.exists() else pull(source).folder


@dataclass(frozen=True)
class _Offer:
    """What a source has: the manifest and its content, and the signature or None."""

    manifest: Manifest
    content: bytes
    signature: bytes | None


def _offer(source: str, files: Files) -> _Offer:
    try:
        content = files.small(MANIFEST_NAME, MOST_MANIFEST_BYTES)
        text = files.small(SIGNATURE_NAME, signature.MOST_SIGNATURE_BYTES)
        trim = files.small(TRIM_NAME, MOST_TRIM_BYTES)
    except InterruptedFetchError as error:
        raise BundleError(f"{error}; check the address and the network") from None
    if content is None:
        raise BundleError(f"{source}: no {MANIFEST_NAME} there; give the address of a bundle's folder")
    manifest = parse(content, f"{source}/{MANIFEST_NAME}")
    if trim is not None:
        manifest = limited(manifest, trim, f"{source}/{TRIM_NAME}")
    return _Offer(manifest, content, text)


def _write_signature(folder: Path, text: bytes | None) -> None:
    path = folder / SIGNATURE_NAME
    try:
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_bytes(text)
    except OSError as error:
        raise BundleError(f"{path}: cannot be written ({error.strerror})") from None


def _pulled(
    files: Files,
    folder: Path,
    offer: _Offer,
    manifest: Manifest,
    progress: Progress | None,
    arrived: Callable[[int, Path], object] | None,
) -> Pulled:
    new = not folder.exists()
    same = not new and read_file(folder / MANIFEST_NAME, MOST_MANIFEST_BYTES) == offer.content
    same = same and _trim_of(folder) == trim_text(manifest)
    if not new and not same and pulled_from(folder) is None:
        raise UsageError(f"{folder}: it has a bundle that was not pulled; choose another folder, or remove it")
    draft = folder if same else draft_of(folder)
    try:
        draft.mkdir(mode=0o700, exist_ok=True)
        if draft.is_symlink() or draft.stat().st_uid != os.geteuid():
            raise BundleError(f"{draft}: a link, or a folder of another user; remove it, or choose another folder")
        check_disk(draft, manifest)
        if not same:
            _start(draft, folder, offer.content, manifest)
        tell = (lambda depth: arrived(depth, draft)) if arrived and new else None
        fetched = fill(files, manifest, draft, progress, tell, served=offer.manifest)
        _check(draft, manifest, remove=not same)
        if not same:
            draft.chmod(0o755)
            _swap(draft, folder)
        _write_signature(folder, offer.signature)
    except OSError as error:
        raise BundleError(
            f"{error.filename or draft}: {error.strerror}; free some disk, or choose another folder"
        ) from None
    return Pulled(folder, manifest, fetched)


def _trim_of(folder: Path) -> bytes | None:
    return read_file(folder / TRIM_NAME, MOST_TRIM_BYTES) if os.path.lexists(folder / TRIM_NAME) else None


def _check(draft: Path, manifest: Manifest, *, remove: bool) -> None:
    """Refuse a bundle that is whole and yet not right.  A draft of it is of no use."""
    try:
        check_bundle(draft, manifest)
    except BundleError:
        if remove:
            shutil.rmtree(draft, ignore_errors=True)
        raise


def _start(draft: Path, folder: Path, content: bytes, manifest: Manifest) -> None:
    """Keep what may be of use: files of an unfinished pull, or else of the older bundle that is replaced."""
    remove_unlisted(draft, manifest)
    (draft / MANIFEST_NAME).write_bytes(content)
    if (text := trim_text(manifest)) is not None:
        (draft / TRIM_NAME).write_bytes(text)
    for entry in manifest.files:
        old, new = folder / entry.name, draft / entry.name
        if old.is_file() and not old.is_symlink() and not os.path.lexists(new):
            new.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(old, new)


def _swap(draft: Path, folder: Path) -> None:
    """Put the whole bundle in its place, and remove the one that was there."""
    old = old_of(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(draft, folder)
    except OSError:
        with suppress(OSError):
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
