"""The files of a bundle at its source, and those of a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from mbq_runtime.bundle.listed_files import FileEntry
from mbq_runtime.bundle.reading import check_regular, open_file, read_file
from mbq_runtime.errors import BundleError

TOKEN_VARIABLE = "MBQ_PULL_TOKEN"
"""Environment variable: a token for the server of an https source.  It is sent to this server alone."""

_READ_BYTES = 1 << 16


class InterruptedFetchError(Exception):
    """The source broke off, or is busy.  The same request may succeed later."""


class Files(Protocol):
    """The files of a bundle at its source."""

    def small(self, name: str, most_bytes: int) -> bytes | None:
        """Read a small file of unknown size.

        Args:
            name: of the file, relative to the bundle.
            most_bytes: a larger file is refused.

        Returns:
            The content; None where there is no such file.

        Raises:
            BundleError: the source refuses the request, or the file is too large.
            InterruptedFetchError: try again.
        """

    def blocks(self, entry: FileEntry, begin: int, end: int) -> AbstractContextManager[Iterator[bytes]]:
        """Read a range of a file.

        Args:
            entry: the file, as the manifest says.
            begin, end: bytes of the file, without ``end``.

        Returns:
            A context that gives blocks of bytes: as many as asked for, or fewer if the source breaks off.

        Raises:
            BundleError: the source refuses the request, or its file is not as the manifest says.
            InterruptedFetchError: try again.
        """


class FolderFiles(Files):
    """A bundle in a folder of this machine.

    folder: the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def small(self, name: str, most_bytes: int) -> bytes | None:
        path = self._folder / name
        return read_file(path, most_bytes) if os.path.lexists(path) else None

    @contextmanager
    def blocks(self, entry: FileEntry, begin: int, end: int) -> Iterator[Iterator[bytes]]:
        path = self._folder / entry.name
        if (size := check_regular(path)) != entry.size:
            raise BundleError(f"{path}: {size} bytes long, needed {entry.size} as the manifest says; ask its maker")
        with open_file(path) as file:
            file.seek(begin)

            def read() -> Iterator[bytes]:
                left = end - begin
                while left and (block := file.read(min(left, _READ_BYTES))):
                    left -= len(block)
                    yield block

            try:
                yield read()
            except OSError as error:
                raise BundleError(f"{path}: cannot be read ({error.strerror}); copy the bundle again") from None
