"""Locks on names of folders: one process at a time writes a bundle, or calibrates in a folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import BundleError, UsageError


def place_behind_links(folder: Path) -> Path:
    """The place that a folder's name leads to, so that what is written there leaves each link as it is.

    Args:
        folder: as the user wrote it.  It need not exist.

    Returns:
        An absolute path without a link.  It is ``folder`` where that has no name, and ends in a link where links lead
        to themselves.
    """
    return Path(os.path.realpath(folder)) if folder.name else folder


@contextmanager
def locked(folder: Path, holder: str, choice: str) -> Iterator[None]:
    """Hold the lock on a folder's name while the block runs.

    The lock is a file beside the folder.  The system releases it when the process ends, also by SIGKILL.

    Args:
        folder: the folder, which need not exist.  Its parent is made if it does not exist.
        holder: what else may hold the lock, for the message: "another export".
        choice: how the user chooses another folder, for the message: "another --output".

    Raises:
        UsageError: another process holds the lock, or the folder is written without a name, as "." is.
        BundleError: the file of the lock cannot be written.
    """
    if not folder.name:
        raise UsageError(f"{folder}: it has no name; choose {choice}, and write its name")
    path = folder.with_name(f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquired(folder, path, f"{holder} writes it now", choice)
    except OSError as error:
        raise BundleError(
            f"{path}: cannot be locked ({error.strerror}); choose {choice}, on a disk of this machine"
        ) from error
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        # The name goes before the lock does: whoever opens the name later makes a new file.
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _acquired(folder: Path, path: Path, busy: str, choice: str) -> int:
    """A descriptor that holds the lock of the file that now has the name."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(descriptor, path):
                return descriptor
            os.close(descriptor)
        except BlockingIOError:
            holder = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            raise UsageError(f"{folder}: {busy} (process {holder}); wait for its end, or choose {choice}") from None
        except OSError:
            os.close(descriptor)
            raise


def _is(descriptor: int, path: Path) -> bool:
    """Whether the open file still has the name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
