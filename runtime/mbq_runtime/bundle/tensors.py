"""The parameters of the TVM engine: one safetensors file, which the engine maps and its library reads by position.

Layout: uint64 length of the header, the header, the tensors without gaps.  The header is JSON, padded with spaces so
that the tensors start on a page.  Kernels read whole cache lines: tensors whose size is a multiple of 64 come first.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import BundleError
from .layout import PAGE_BYTES

WEIGHTS = "decoder.safetensors"
_LINE_BYTES = 64
_MAX_HEADER_BYTES = 64 << 20


@dataclass(frozen=True)
class Entry:
    """One tensor.

    dtype: name in safetensors: "U8", "F16" or "F32".
    shape: its dimensions.
    place: bytes from the start of the file.
    size: bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    place: int
    size: int


def plan(tensors: Mapping[str, tuple[str, tuple[int, ...], int]]) -> dict[str, Entry]:
    """Choose the place of each tensor.

    Args:
        tensors: (dtype, shape, bytes) by name.

    Returns:
        Entries by name, in the order in which the tensors must be written.
    """
    names = sorted(tensors, key=lambda name: tensors[name][2] % _LINE_BYTES != 0)
    entries, at = {}, 0
    for name in names:
        dtype, shape, size = tensors[name]
        entries[name] = Entry(dtype, shape, at, size)
        at += size
    start = 8 + len(_header(entries))
    return {name: Entry(e.dtype, e.shape, e.place + start, e.size) for name, e in entries.items()}


def write_header(entries: Mapping[str, Entry], file: BinaryIO) -> None:
    """Write all that comes before the first tensor.

    Args:
        entries: what ``plan`` returned.
        file: open for writing, at its start.
    """
    first = min(e.place for e in entries.values())
    header = _header({name: Entry(e.dtype, e.shape, e.place - first, e.size) for name, e in entries.items()})
    file.write(struct.pack("<Q", len(header)) + header)


def _header(entries: Mapping[str, Entry]) -> bytes:
    """The padded header.  The places of ``entries`` are counted from the first tensor."""
    document = {
        name: {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [e.place, e.place + e.size]}
        for name, e in entries.items()
    }
    text = json.dumps(document, separators=(",", ":")).encode()
    return text + b" " * (-(8 + len(text)) % PAGE_BYTES)


def read_entries(path: Path) -> dict[str, Entry]:
    """The tensors of a file, by name.

    Args:
        path: safetensors file.

    Raises:
        BundleError: the file cannot be read, is no safetensors file, or a tensor reaches past its end.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, _MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            document = json.loads(file.read(length))
        return dict(_entries(document, 8 + length, size))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise BundleError(f"{path}: not a safetensors file ({error}); export the bundle again") from None


def _entries(document: Mapping[str, Any], start: int, size: int) -> Iterable[tuple[str, Entry]]:
    for name, value in document.items():
        if name == "__metadata__":
            continue
        first, last = value["data_offsets"]
        if not 0 <= first <= last <= size - start:
            raise ValueError(f"{name} lies outside the file")
        yield name, Entry(value["dtype"], tuple(value["shape"]), start + first, last - first)
