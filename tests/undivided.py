"""Parts of a manifest that does not divide weights by depth."""

from __future__ import annotations

from mbq_runtime.bundle.file_names import WEIGHT_FILES
from mbq_runtime.bundle.listed_files import FileEntry, FileRange


def undivided(files: tuple[FileEntry, ...]) -> tuple[tuple[FileRange, ...], ...]:
    """The ``parts`` of a manifest where every depth needs the whole weight files.

    Args:
        files: of the bundle.
    """
    return (tuple(FileRange(entry.name, 0, entry.size) for entry in files if entry.name in WEIGHT_FILES),)
