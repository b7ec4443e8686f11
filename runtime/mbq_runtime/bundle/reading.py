"""Opens and reads the files of a bundle from a stranger.

Only regular files are opened: a link can lead anywhere, a pipe or a device never ends.  JSON is read more strictly than
by Python's reader: each document has one meaning for every reader, and no value is out of range later.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import BundleError

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_MOST_DEPTH = 64
_BLOCK_BYTES = 1 << 20
_MOST_SHOWN = 120  # characters


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading.  Does not wait for a pipe and does not follow a link.

    Args:
        path: the file.

    Raises:
        BundleError: the file is missing, is not a regular file, or cannot be read.
    """
    check_regular(path)
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}); copy the bundle again") from None
    return file


def check_regular(path: Path) -> int:
    """Refuse links, folders, pipes and devices.

    Args:
        path: a file of a bundle.

    Returns:
        Size in bytes.

    Raises:
        BundleError: there is no file, or it is not a regular file.
    """
    try:
        found = os.lstat(path)
    except (OSError, ValueError):
        raise BundleError(f"{path}: the file is missing from the bundle; copy the bundle again") from None
    if stat.S_ISLNK(found.st_mode):
        raise BundleError(f"{path}: a symbolic link, needed the file itself; copy the bundle with cp -rL")
    if stat.S_ISDIR(found.st_mode):
        raise BundleError(f"{path}: the file is missing from the bundle, a folder has its name; copy the bundle again")
    if not stat.S_ISREG(found.st_mode):
        raise BundleError(f"{path}: a pipe, socket or device, needed a regular file; do not trust the bundle")
    return found.st_size


def read_file(path: Path, most_bytes: int) -> bytes:
    """All bytes of a small file.

    Args:
        path: the file.
        most_bytes: a larger file is refused and not read.

    Raises:
        BundleError: the file cannot be read or is too large.
    """
    with open_file(path) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise BundleError(f"{path}: larger than {most_bytes} bytes, the most for this file; export the bundle again")
    return data


def read_json(path: Path, most_bytes: int, *, most_digits: int = 18) -> Any:
    """Read a JSON document.

    Refused are: a key that comes twice in an object, NaN and Infinity, numbers that do not fit 64 bits, half
    characters (lone surrogates), text that is not UTF-8, and objects within more than 64 others.

    Args:
        path: the file.
        most_bytes: a larger file is refused and not read.
        most_digits: digits of a whole number; 18 fit 64 bits.

    Raises:
        BundleError: the file cannot be read, is too large, or is no such JSON.
    """
    try:
        return parse_json(read_file(path, most_bytes), most_digits)
    except ValueError as error:
        raise BundleError(f"{path}: not valid JSON ({error}); copy the bundle again") from None


def parse_json(data: bytes, most_digits: int = 18) -> Any:
    """Parse a JSON document, as strictly as ``read_json``.

    Args:
        data: UTF-8 text.
        most_digits: digits of a whole number.

    Raises:
        ValueError: it is no such JSON.
    """
    try:
        document = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object, parse_constant=_constant, parse_float=_number,
            parse_int=lambda text: _whole(text, most_digits),
        )  # fmt: skip
        if _SURROGATE.search(data):
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except UnicodeEncodeError:
        raise ValueError("a text has half a character") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    _check_depth(document, _MOST_DEPTH)
    return document


def _check_depth(document: Any, most: int) -> None:
    level = _containers([document])
    for _ in range(most):
        level = [inner for one in level for inner in _containers(one.values() if isinstance(one, dict) else one)]
        if not level:
            return
    raise ValueError("it is nested too deep")


def _containers(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if isinstance(value, dict | list)]


def check_text(path: Path, most_bytes: int) -> None:
    """Refuse a file that is not UTF-8.  Reads block by block.

    Args:
        path: the file.
        most_bytes: a larger file is refused and not read.

    Raises:
        BundleError: the file cannot be read, is too large, or has a byte that is not UTF-8.
    """
    if check_regular(path) > most_bytes:
        raise BundleError(f"{path}: larger than {most_bytes} bytes, the most for this file; export the bundle again")
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    with open_file(path) as file:
        while block := file.read(_BLOCK_BYTES):
            _decode(decoder, block, done, path)
            done += len(block)
    _decode(decoder, b"", done, path, final=True)


def _decode(decoder: codecs.IncrementalDecoder, block: bytes, at: int, path: Path, *, final: bool = False) -> None:
    try:
        decoder.decode(block, final)
    except UnicodeDecodeError as error:
        place = at + max(error.start, 0)
        raise BundleError(f"{path}: near byte {place}: not UTF-8 text; copy or export the bundle again") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:60]!r} comes twice in one object")
            seen.add(key)
    return found


def _constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _whole(text: str, most_digits: int) -> int:
    if len(text) > most_digits:
        raise ValueError(f"the number {text[:20]}... has {len(text)} digits, needed at most {most_digits}")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def shown(value: object) -> str:
    """A value for a message, cut where it is long.

    Args:
        value: what a JSON reader returned.
    """
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
