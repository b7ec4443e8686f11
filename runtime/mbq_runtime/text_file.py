"""Texts that a user names: read whole, up to a bound, so that a device or a wrong file does not fill the memory."""

from __future__ import annotations

from pathlib import Path

from .errors import UsageError


def read_text_file(path: Path, most_bytes: int) -> str:
    """Read a text.

    Args:
        path: UTF-8 file.
        most_bytes: a larger file is refused, and read no further.

    Raises:
        UsageError: the file cannot be read, is too large, or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give a UTF-8 text file") from None
    if len(content) > most_bytes:
        raise UsageError(f"{path}: larger than {most_bytes >> 20} MiB, the most for this file; give a part of it")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8 first") from None
