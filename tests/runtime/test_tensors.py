"""The file from which a compiled decoder reads its parameters, by position."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from mbq_runtime.bundle.tensors import PAGE_BYTES, plan, read_entries, write_header
from mbq_runtime.errors import BundleError

TENSORS = {
    "norm": ("F32", (9,), 36),
    "planes": ("U8", (128,), 128),
    "b1": ("F32", (2,), 8),
    "scales": ("F16", (2, 16), 64),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    entries = plan(TENSORS)
    with path.open("wb") as file:
        write_header(entries, file)
        for name, entry in entries.items():
            assert file.tell() == entry.place
            file.write(name[:1].encode() * entry.size)
    return path


def test_a_file_says_where_its_tensors_are(path: Path) -> None:
    entries = read_entries(path)
    assert entries == plan(TENSORS)
    data = path.read_bytes()
    for name, entry in entries.items():
        assert data[entry.place : entry.place + entry.size] == name[:1].encode() * entry.size


def test_what_kernels_read_by_lines_starts_on_one(path: Path) -> None:
    entries = read_entries(path)
    assert entries["planes"].place == PAGE_BYTES
    assert entries["scales"].place % 64 == 0
    assert max(entries[name].place for name in ("planes", "scales")) < min(entries[n].place for n in ("norm", "b1"))


def test_deeper_tensors_come_later_on_a_page(path: Path) -> None:
    entries = plan(TENSORS, {"planes": 2, "b1": 3})
    assert list(entries) == ["scales", "norm", "padding.2", "planes", "padding.3", "b1"]
    assert [entries[name].place for name in ("scales", "planes", "b1")] == [PAGE_BYTES, 2 * PAGE_BYTES, 3 * PAGE_BYTES]
    ends = {name: entry.place + entry.size for name, entry in entries.items()}
    assert (ends["padding.2"], ends["padding.3"]) == (entries["planes"].place, entries["b1"].place)


@pytest.mark.parametrize(
    "broken",
    [
        lambda data: b"",
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: struct.pack("<Q", 1 << 62) + data[8:],
        lambda data: data[:8] + b"[" + data[9:],
        lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[9,999', 1),
    ],
)
def test_a_broken_file_is_refused(path: Path, broken: object) -> None:
    path.write_bytes(broken(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(BundleError, match="not a safetensors file"):
        read_entries(path)
