"""The TVM engine's parameters: one safetensors file, which the device maps and a library reads by place.

Layout: uint64 length of the header, the header (JSON, padded with spaces so that the data start on a page), the
tensors without gaps.  Kernels read whole cache lines: tensors whose size is a multiple of 64 come first.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import BundleError

WEIGHTS = "decoder.safetensors"
PAGE_BYTES = 4096
_LINE_BYTES = 64
_MAX_HEADER_BYTES = 64 << 20


@dataclass(frozen=True)
class Entry:
    """One tensor.  dtype: safetensors' name ("U8", "F16", "F32"); place: bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    place: int
    size: int


def plan(tensors: Mapping[str, tuple[str, tuple[int, ...], int]]) -> dict[str, Entry]:
    """Where each tensor {name: (dtype, shape, bytes)} will lie, in the order they are written."""
    names = sorted(tensors, key=lambda name: tensors[name][2] % _LINE_BYTES != 0)
    entries, at = {}, 0
    for name in names:
        dtype, shape, size = tensors[name]
        entries[name] = Entry(dtype, shape, at, size)
        at += size
    start = 8 + len(_header(entries))
    return {name: Entry(e.dtype, e.shape, e.place + start, e.size) for name, e in entries.items()}


def write_header(entries: Mapping[str, Entry], file: BinaryIO) -> None:
    first = min(e.place for e in entries.values())
    header = _header({name: Entry(e.dtype, e.shape, e.place - first, e.size) for name, e in entries.items()})
    file.write(struct.pack("<Q", len(header)) + header)


def _header(entries: Mapping[str, Entry]) -> bytes:
    """entries: places counted from the first tensor."""
    document = {
        name: {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [e.place, e.place + e.size]}
        for name, e in entries.items()
    }
    text = json.dumps(document, separators=(",", ":")).encode()
    return text + b" " * (-(8 + len(text)) % PAGE_BYTES)


def read_entries(path: Path) -> dict[str, Entry]:
    """The tensors of a file, all within it.  Raises BundleError."""
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
