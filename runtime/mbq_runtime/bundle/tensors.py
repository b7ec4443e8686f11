"""The parameters of the TVM engine: one safetensors file, which the engine maps and its library reads by position.

Layout: uint64 length of the header, the header, the tensors without gaps.  The header is JSON, padded with spaces so
that the tensors start on a page.  The tensors that depth 1 reads come first, then those that depth 2 reads besides, and
so on.  Those of each depth start on a page; a tensor of padding fills the gap before it.  Kernels read whole cache
lines: within a depth, tensors whose size is a multiple of 64 come first.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from ..errors import BundleError
from .layout import PAGE_BYTES
from .reading import open_file, parse_json

WEIGHTS = "decoder.safetensors"
PADDING = "padding."
"""Names of tensors without content begin so."""
_LINE_BYTES = 64
_MAX_HEADER_BYTES = 4 << 20  # those of large models have about one
_DTYPE_BYTES = {"U8": 1, "F16": 2, "F32": 4}


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


def plan(
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]], depths: Mapping[str, int] = MappingProxyType({})
) -> dict[str, Entry]:
    """Choose the place of each tensor.

    Args:
        tensors: (dtype, shape, bytes) by name.
        depths: the first depth that reads a tensor, by name; 1 for a tensor that is not named.

    Returns:
        Entries by name, in the order in which the tensors must be written, with those of the padding.
    """
    names = sorted(tensors, key=lambda name: (depths.get(name, 1), tensors[name][2] % _LINE_BYTES != 0))
    entries, at, depth = {}, 0, 1
    for name in names:
        dtype, shape, size = tensors[name]
        if depths.get(name, 1) > depth:
            depth = depths[name]
            gap = -at % PAGE_BYTES
            if gap:
                entries[f"{PADDING}{depth}"] = Entry("U8", (gap,), at, gap)
            at += gap
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


def read_entries(path: Path, size: int | None = None) -> dict[str, Entry]:
    """The tensors of a file, by name.

    Args:
        path: safetensors file.
        size: bytes of the whole file, where only its first part is there; None for what is there.

    Raises:
        BundleError: the file cannot be read, is no safetensors file, or a tensor reaches past its end.
    """
    try:
        with open_file(path) as file:
            held = file.seek(0, 2)
            file.seek(0)
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(held, _MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {held}")
            document = parse_json(file.read(length))
        return dict(_entries(document, 8 + length, held if size is None else size))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise BundleError(f"{path}: not a safetensors file ({error}); export the bundle again") from None


def _entries(document: Mapping[str, Any], start: int, size: int) -> Iterable[tuple[str, Entry]]:
    for name, value in document.items():
        if name == "__metadata__":
            continue
        first, last = value["data_offsets"]
        shape = tuple(value["shape"])
        if not all(type(number) is int and number >= 0 for number in (first, last, *shape)):
            raise ValueError(f"{name[:80]} has a number below 0, or not a whole one")
        if not first <= last <= size - start:
            raise ValueError(f"{name[:80]} lies outside the file")
        needed = math.prod(shape) * _DTYPE_BYTES[value["dtype"]]
        if last - first != needed:
            raise ValueError(f"{name[:80]} has {last - first} bytes, needed {needed}")
        yield name, Entry(value["dtype"], shape, start + first, last - first)
