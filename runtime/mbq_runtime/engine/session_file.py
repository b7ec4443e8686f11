"""The file of a session: a line of JSON that says whose tokens it has, then arrays one after the other.

The sizes of the arrays are known before they are read, so a file cannot ask for more memory than its session takes.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.manifest import bundle_hash
from mbq_runtime.errors import UsageError
from mbq_runtime.version import installed_version
from mbq_runtime.whole_file import whole_file

from .backend import Backend

_FORMAT = 1
_MOST_HEADER_BYTES = 4096


def owner(folder: Path, engine: str, backend: Backend) -> dict[str, Any]:
    """What must be the same where a file is read: format, bundle, engine and version.

    Args:
        folder: of the bundle.
        engine: kind of engine, as each has a layout of its own.
        backend: the engine's model.

    Raises:
        UsageError: the model gives no keys and values, or takes none back.
    """
    if not backend.rewinds:
        raise UsageError(f"{folder}: the states of this model are not written to a file; keep mbq serve running")
    if not backend.keeps:
        raise UsageError(
            f"{folder}: engine {engine} cannot load keys and values from a file; export the bundle with "
            "--engine tvm, or keep mbq serve running"
        )
    return {"format": _FORMAT, "bundle": bundle_hash(folder), "engine": engine, "version": installed_version()}


def write(path: Path, about: Mapping[str, Any], arrays: Sequence[NDArray[Any]]) -> None:
    """Write a file, or leave the old one.

    Args:
        path: the file.
        about: values for JSON.
        arrays: what follows.

    Raises:
        UsageError: it cannot be written.
    """
    digest = hashlib.sha256()
    parts = [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for array in arrays]
    for part in parts:
        digest.update(part)
    try:
        with whole_file(path) as file:
            file.write(json.dumps({**about, "sha256": digest.hexdigest()}).encode() + b"\n")
            for part in parts:
                file.write(part)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}); choose another place") from None


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read.  A pipe or a device never ends.

    Args:
        path: the file.

    Raises:
        UsageError: it is not a regular file.
        OSError: it cannot be opened.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise UsageError(f"{path}: not a regular file; give the file of a session")
    return path.open("rb")


def check_size(file: BinaryIO, path: Path, least_bytes: int) -> None:
    """Refuse a file that is too short, before memory is taken for what it says.

    Args:
        file: the open file.
        path: its name, for messages.
        least_bytes: of the arrays.

    Raises:
        UsageError: it is too short.
    """
    if os.fstat(file.fileno()).st_size < least_bytes:
        raise UsageError(f"{path}: damaged; remove it, and the next run makes it again")


def read_about(file: BinaryIO, path: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The line of JSON at the start.

    Args:
        file: open at its start.
        path: its name, for messages.
        wanted: what ``owner`` returned.

    Raises:
        UsageError: it is no such file, or another bundle's, engine's or version's.
    """
    try:
        about = json.loads(file.readline(_MOST_HEADER_BYTES))
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict) or type(about.get("tokens")) is not int:
        raise UsageError(f"{path}: not the file of a session; remove it or give another name")
    for name, value in wanted.items():
        if about.get(name) != value:
            raise UsageError(
                f"{path}: its {name} is {str(about.get(name))[:64]!r}, needed {value!r}; remove it or give another name"
            )
    return about


def read_arrays(file: BinaryIO, path: Path, about: Mapping[str, Any], like: Sequence[NDArray[Any]]) -> list[Any]:
    """The arrays.

    Args:
        file: open behind the line of JSON.
        path: its name, for messages.
        about: what ``read_about`` returned.
        like: arrays of the same shapes and types, in order.

    Raises:
        UsageError: the file is damaged.
    """
    digest, found = hashlib.sha256(), []
    for array in like:
        data = file.read(array.nbytes)
        digest.update(data)
        if len(data) == array.nbytes:
            found.append(np.frombuffer(data, array.dtype).reshape(array.shape))
    if len(found) < len(like) or file.read(1) or digest.hexdigest() != about.get("sha256"):
        raise UsageError(f"{path}: damaged; remove it, and the next run makes it again")
    return found
