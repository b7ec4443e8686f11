"""Building: every target on this host, the cache, and errors."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from op_libraries import Build, runnable

from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_runtime.cache import CACHE_VARIABLE
from mbq_runtime.errors import BuildError
from mbq_targets import build as build_room
from mbq_targets.build import build_ops_library
from mbq_targets.machines import TARGETS
from mbq_targets.spec import KernelSpec

pytestmark = pytest.mark.heavy

PROFILE = SliceProfile((3, 1, 2, 2))
MACHINES = {"x86_64": 62, "aarch64": 183}  # e_machine
# The C library's own files: its threads are in one of their own before glibc 2.34, which targets are linked for.
ALLOWED = {"libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}


def needed(data: bytes) -> tuple[int, set[str]]:
    """e_machine and the libraries a 64-bit ELF file asks for."""
    machine, section_offset = struct.unpack_from("<H", data, 18)[0], struct.unpack_from("<Q", data, 40)[0]
    size, count = struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, section_offset + i * size) for i in range(count)]
    names = set()
    for section in sections:
        if section[1] != 6:  # SHT_DYNAMIC
            continue
        strings = sections[section[6]]
        for at in range(section[4], section[4] + section[5], 16):
            tag, value = struct.unpack_from("<QQ", data, at)
            if tag == 1:  # DT_NEEDED
                start = strings[4] + value
                names.add(data[start : data.index(b"\0", start)].decode())
    return machine, names


@pytest.mark.parametrize("target", [t.name for t in TARGETS.values() if t.native])
def test_every_target_builds_here(target: str, library: Build) -> None:
    """With what other tests run: ``tests/arm64`` has keys and values of 8 bits, so nothing is compiled twice."""
    kv_bits, most_bytes = {"x86_64": (32, 200_000), "aarch64": (8, 330_000)}[TARGETS[target].arch]
    data = library(target, KernelSpec(PROFILE, 64, kv_bits=kv_bits)).read_bytes()
    machine, libraries = needed(data)
    assert machine == MACHINES[TARGETS[target].arch]
    assert "libc.so.6" in libraries
    assert libraries <= ALLOWED
    assert len(data) < most_bytes


def test_the_library_says_what_it_is_for(library: Build) -> None:
    target = runnable()[0]
    info = ctypes.CDLL(str(library(target.name, KernelSpec(PROFILE, 64)))).mbq_ops_build_info
    info.restype = ctypes.c_char_p
    wanted = f"target={target.name} isa={target.isa} slices=3,1,2,2 group_size=64 activation_bits=16"
    assert info().decode() == wanted


def test_only_the_entry_points_are_exported(library: Build) -> None:
    loaded = ctypes.CDLL(str(library(runnable()[0].name, KernelSpec(PROFILE, 64))))
    assert loaded.RegisterCustomOps
    for hidden in ("__tvm_ffi_mbq_quantize", "TVMFFIErrorSetRaisedFromCStrParts", "ort_api"):
        with pytest.raises(AttributeError):
            getattr(loaded, hidden)


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same request is compiled once; the key separates targets and specs."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    built = []

    def fake(target: object, spec: object, folder: Path) -> Path:
        built.append((target, spec))
        (folder / "x.so").write_bytes(b"library")
        return folder / "x.so"

    monkeypatch.setattr(build_room, "_build", fake)
    requests = [
        ("rpi5", KernelSpec(PROFILE, 64)),
        ("rpi4", KernelSpec(PROFILE, 64)),
        ("rpi5", KernelSpec(SliceProfile((2, 2, 2, 2)), 64)),
        ("rpi5", KernelSpec(PROFILE, 32)),
        ("rpi5", KernelSpec(PROFILE, 64, activation_bits=8)),
    ]
    for target, spec in (*requests, *requests):
        out = tmp_path / "out" / "lib.so"
        build_ops_library(TARGETS[target], spec, out)
        assert out.read_bytes() == b"library"
    assert len(built) == len(requests)
    assert len(list((tmp_path / "cache/ops").iterdir())) == len(requests)
    assert os.listdir(tmp_path / "out") == ["lib.so"]


BUILD = """
import sys
from pathlib import Path
from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_targets.build import build_ops_library
from mbq_targets.machines import TARGETS
from mbq_targets.spec import KernelSpec
build_ops_library(TARGETS[sys.argv[1]], KernelSpec(SliceProfile((8,)), 64), Path(sys.argv[2]))
"""


def test_the_build_gives_the_same_bytes_elsewhere(library: Build, tmp_path: Path) -> None:
    """In another process, folder, cache, home and time zone, and at another time: the published hashes need that.

    A single depth is compiled in the least time.
    """
    first = library("rpi4", KernelSpec(SliceProfile((8,)), 64)).read_bytes()
    scratch = tmp_path / "another place" / "deep"
    scratch.mkdir(parents=True)
    changed = {
        "TMPDIR": str(scratch),
        "HOME": str(scratch),
        CACHE_VARIABLE: str(scratch / "cache"),
        "TZ": "Asia/Tokyo",
        "LC_ALL": "C",
    }
    command = [sys.executable, "-c", BUILD, "rpi4", str(scratch / "library.so")]
    subprocess.run(command, env={**os.environ, **changed, "PYTHONHASHSEED": "7"}, cwd=scratch, check=True)
    assert (scratch / "library.so").read_bytes() == first
    for place in (scratch, tmp_path, Path.home(), Path(build_room.__file__).parent):
        assert bytes(place) not in first


DAMAGE = {
    "empty": lambda data: b"",
    "cut off": lambda data: data[: len(data) // 2],
    "one bit": lambda data: data[:3] + bytes([data[3] ^ 1]) + data[4:],
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_entry_of_the_cache_is_made_again(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    built = []

    def make(folder: Path) -> Path:
        built.append(folder)
        (folder / "x.so").write_bytes(b"a library")
        return folder / "x.so"

    entry = build_room._cached("ops/key.so", make)
    entry.write_bytes(DAMAGE[damage](entry.read_bytes()))
    again = build_room._cached("ops/key.so", make)
    assert again.read_bytes() == b"a library"
    assert build_room._cached("ops/key.so", make) == again
    assert len(built) == 2
    assert os.listdir(again.parent) == [again.name]


def test_portable_has_no_library(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="target portable: it has no native library to build"):
        build_ops_library(TARGETS["portable"], KernelSpec(PROFILE, 64), tmp_path / "x.so")


def test_numbers_without_kernels() -> None:
    with pytest.raises(BuildError, match="group size 48: kernels exist for 32, 64, 128"):
        KernelSpec(PROFILE, 48)
    with pytest.raises(BuildError, match="activation bits 4: kernels exist for 8, 16"):
        KernelSpec(PROFILE, 64, activation_bits=4)


def test_a_failing_tool_is_reported_with_its_last_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    broken = SimpleNamespace(mod=SimpleNamespace(write_to_file=lambda out: Path(out).write_bytes(b"not an object")))
    monkeypatch.setattr(build_room, "_compiled", lambda *args, **more: broken)
    with pytest.raises(BuildError, match=r"linking the library for rpi5 failed: .*error"):
        build_ops_library(TARGETS["rpi5"], KernelSpec(PROFILE, 64), tmp_path / "x.so")
    assert not (tmp_path / "x.so").exists()
