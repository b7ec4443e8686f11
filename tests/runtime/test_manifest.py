from __future__ import annotations

import json
from dataclasses import asdict, replace
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from json_fields import set_in
from tiny_bundle import facts
from undivided import undivided

from mbq_runtime import BundleError, UsageError
from mbq_runtime.bundle import listed_files, manifest
from mbq_runtime.bundle.facts import Budget, Linear, TargetFacts, Weights
from mbq_runtime.bundle.file_names import MANIFEST_NAME
from mbq_runtime.bundle.listed_files import FileRange, file_entries
from mbq_runtime.bundle.verify import check_sizes, check_unlisted, verify


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write files with the right names and any content, and their manifest."""
    path = tmp_path / "bundle"
    (path / "lib").mkdir(parents=True)
    for name in ("model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", "lib/libmbq_ops.so"):
        (path / name).write_bytes(name.encode() * 100)
    native = replace(
        facts(),
        layout="mbq16",
        target=TargetFacts("arm64", "onnx", "aarch64", "generic", ("asimd", "asimddp")),
        weights=Weights(128 * 64, {"3": 10, "3.5": 12, "8": 20}, (Linear("head", 128, 64),)),
    )
    files = file_entries(path)
    manifest.write(replace(native, files=files, parts=undivided(files)), path)
    return path


def test_round_trip(folder: Path) -> None:
    read = manifest.read(folder)
    assert read.native
    assert read.profile.depth_bits == (3, 4, 6, 8)
    assert read.target.features == ("asimd", "asimddp")
    assert read.weights.linears == (Linear("head", 128, 64),)
    assert read.weights.bytes_per_token == {"3": 10, "3.5": 12, "8": 20}
    assert [entry.name for entry in read.files] == sorted(entry.name for entry in read.files)
    assert (
        read.total_bytes
        == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        - (folder / "manifest.json").stat().st_size
    )
    before = (folder / "manifest.json").read_bytes()
    manifest.write(read, folder)
    assert (folder / "manifest.json").read_bytes() == before
    assert json.loads(before)["format"] == "mbq-bundle"
    assert verify(folder) == read
    assert not list(folder.glob(".*"))


def test_keys_of_a_later_minor_version_are_ignored(folder: Path) -> None:
    set_in(folder / MANIFEST_NAME, "model.colour", "blue")
    assert manifest.read(folder).model.name == "tiny"


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("format", "zip", "format is 'zip', needed 'mbq-bundle'"),
        ("format_version", 4, r"format_version is 4, this mbq reads 3; upgrade"),
        ("format_version", 2, r"format_version is 2, this mbq reads 3; export the model again"),
        ("format_version", 0, r"format_version is 0, needed 3"),
        ("format_version", "1", "format_version is '1'"),
        ("format_version", True, "format_version is True"),
        ("model", ..., "model is missing"),
        ("model.vocab_size", ..., "model.vocab_size is missing"),
        ("model.vocab_size", "many", "model.vocab_size is 'many', needed a whole number"),
        ("model.vocab_size", True, "model.vocab_size is True, needed a whole number"),
        ("model.layers", 0, "model.layers is 0, needed above 0"),
        ("model", [], r"model is \[\], needed an object"),
        ("budget.min_bits", "3", "budget.min_bits is '3', needed a finite number"),
        ("budget.min_bits", 2.5, "budget is '2.5 to 8, default 8', needed a range within 3 to 8 bits"),
        ("budget.default_bits", 9, "budget is '3 to 8, default 9'"),
        ("slices", [4, 4, 1], "slice widths 4,4,1"),
        ("slices", 8, "slices is 8, needed a list"),
        ("group_size", 48, "group_size is 48, needed one of"),
        ("layout", "gguf", "layout is 'gguf', needed mbq16 or nbits"),
        ("target.arch", "riscv64", "target.arch is 'riscv64'"),
        ("target.engine", "tvm", "target.engine is 'tvm'"),
        ("target.features", ["asimd", 3], r"target.features\[1\] is 3, needed text"),
        ("weights.linears.0.K", 65, "weights.linears head is '128 x 65', needed K a multiple of group_size 64"),
        ("weights.bytes_per_token", {"four": 1}, "weights.bytes_per_token is 'four'"),
        ("weights.bytes_per_token", {"nan": 1}, "weights.bytes_per_token is 'nan', needed numbers of bits above 0"),
        ("weights.bytes_per_token", {"0": 1, "8": 2}, "weights.bytes_per_token is '0'"),
        ("weights.bytes_per_token", {"8.5": 1}, "weights.bytes_per_token is '8.5'"),
        ("weights.bytes_per_token", {"3": 1, "3.0": 2}, "weights.bytes_per_token is '3.0', needed each number of bits"),
        ("weights.bytes_per_token", {"3": 0, "8": 2}, r"weights.bytes_per_token\.3 is 0, needed above 0"),
        ("weights.bytes_per_token", {"3": -1}, r"weights.bytes_per_token\.3 is -1, needed above 0"),
        ("files.0.name", "../model.onnx", "files is '../model.onnx', needed names relative to the bundle"),
        ("files.0.name", "/etc/passwd", "files is '/etc/passwd'"),
        ("files.0.name", "lib/../../x", "files is 'lib/../../x'"),
        ("files.0.name", "C:x", "files is 'C:x'"),
        ("files.0.name", "..\\x", "files is"),
        ("files.0.name", "", "files is ''"),
        ("files.0.name", "manifest.json", "files is 'manifest.json'"),
        ("files.0.name", "other.json", "does not list genai_config.json"),
        ("files.0.name", "tokenizer.json", "lists tokenizer.json twice"),
        ("files.0.size", -1, "files genai_config.json is"),
        ("files.0.sha256", "abc", "files genai_config.json is"),
        ("files.0.chunks", ["0" * 64], "files genai_config.json chunks is '1 hashes', needed 0"),
        ("files.0.size", listed_files.CHUNK_BYTES + 1, "files genai_config.json chunks is '0 hashes', needed 2"),
        ("parts", [[], []], "parts has 2 depths, needed 1 or 4"),
        ("parts", [[]], r"parts ends at byte 0 of model\.onnx\.data, needed 1500"),
        ("parts.0.0.name", "model.onnx", "parts has bytes 0 to 1500 of 'model.onnx', needed a range of a weight file"),
        ("parts.0.0.begin", 1, "parts has bytes 1 to 1500 of 'model.onnx.data', needed .* begins at 0"),
        ("parts.0.0.end", 1499, "parts has bytes 0 to 1499 .* ends on a page of 4096 bytes"),
        ("parts.0.0.end", 4096, r"parts ends at byte 4096 of model\.onnx\.data, needed 1500"),
    ],
)
def test_a_damaged_manifest_is_refused_by_field(folder: Path, where: str, value: object, message: str) -> None:
    set_in(folder / MANIFEST_NAME, where, value)
    with pytest.raises(BundleError, match=message) as caught:
        manifest.read(folder)
    assert str(caught.value).startswith(str(folder / "manifest.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"format": NaN}', "\x00", "[" * 100_000, "\xff\xfe"])
def test_what_is_no_manifest_at_all(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text, encoding="latin1")
    with pytest.raises(BundleError, match=r"manifest\.json: (not valid JSON|format is)"):
        manifest.read(folder)


def test_folders_that_are_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        manifest.read(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"no manifest\.json; give the folder that mbq-export wrote"):
        manifest.read(tmp_path)


@pytest.mark.parametrize("check", [check_sizes, lambda folder, _: verify(folder)])
@pytest.mark.parametrize("name", ["model.onnx.data", "lib/libmbq_ops.so", "tokenizer.json"])
def test_missing_and_truncated_files(folder: Path, name: str, check: Any) -> None:
    found = manifest.read(folder)
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(BundleError, match=f"{name}: {len(whole) - 1} bytes long where the manifest says {len(whole)}"):
        check(folder, found)
    path.unlink()
    with pytest.raises(BundleError, match=f"{name}: the file is missing"):
        check(folder, found)
    path.mkdir()
    with pytest.raises(BundleError, match=f"{name}: the file is missing"):
        check(folder, found)


def test_verify_finds_one_flipped_bit(folder: Path) -> None:
    path = folder / "model.onnx.data"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    check_sizes(folder, manifest.read(folder))
    with pytest.raises(BundleError, match=r"model\.onnx\.data: its contents differ from the manifest"):
        verify(folder)


@pytest.mark.parametrize(
    ("name", "matters"),
    [
        ("README.md", False),
        ("LICENSE", False),
        ("NOTICE", False),
        (".gitattributes", False),
        (".cache/huggingface/.gitignore", False),
        (".cache/huggingface/CACHEDIR.TAG", False),
        (".cache/huggingface/download/lib/libmbq_ops.so.metadata", False),
        (".cache/huggingface/download/model.onnx.lock", False),
        (".cache/huggingface/download/model.onnx", True),
        (".cache/model.onnx.lock", True),
        ("vocab.json", True),
        ("lib/other.so", True),
        (".git/config", True),
        (".so", True),
        ("readme.so", True),
        ("LICENSE.so", True),
        ("license", True),
        ("lib/LICENSE", True),
    ],
)
def test_verify_minds_unlisted_files_an_engine_may_read(folder: Path, name: str, matters: bool) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("x")
    found = manifest.read(folder)
    if not matters:
        check_unlisted(folder, found)
        verify(folder)
        return
    with pytest.raises(BundleError, match=f"{name}: not listed in the manifest"):
        check_unlisted(folder, found)
    with pytest.raises(BundleError, match=f"{name}: not listed in the manifest"):
        verify(folder)


def test_a_large_file_has_a_hash_for_each_chunk(folder: Path) -> None:
    path, size = folder / "model.onnx.data", 2 * listed_files.CHUNK_BYTES + 5000
    content = bytearray(range(250)) * (size // 250)
    path.write_bytes(content)
    files = file_entries(folder)
    manifest.write(replace(manifest.read(folder), files=files, parts=undivided(files)), folder)
    (entry,) = (entry for entry in verify(folder).files if entry.name == path.name)
    assert len(entry.chunks) == 3
    for begin, end, digest in entry.ranges():
        assert sha256(content[begin:end]).hexdigest() == digest
    content[listed_files.CHUNK_BYTES + 7] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.onnx\.data: bytes 4194304 to 8388608 differ from the manifest"):
        verify(folder)
    manifest.write(replace(manifest.read(folder), files=file_entries(folder)), folder)
    set_in(folder / MANIFEST_NAME, "files.3.sha256", "0" * 64)
    assert manifest.read(folder).files[3].name == path.name
    with pytest.raises(BundleError, match=r"model\.onnx\.data: its contents differ from the manifest"):
        verify(folder)


def test_parts_divide_the_weights_by_depth(folder: Path) -> None:
    (folder / "model.onnx.data").write_bytes(bytes(20_000))
    cuts = (0, 8192, 8192, 12_288, 20_000)
    parts = tuple((FileRange("model.onnx.data", a, b),) for a, b in pairwise(cuts))
    manifest.write(replace(manifest.read(folder), files=file_entries(folder), parts=parts), folder)
    found = verify(folder)
    assert found.parts == parts
    assert [found.needed_bytes(depth)["model.onnx.data"] for depth in (1, 2, 3, 4)] == [8192, 8192, 12_288, 20_000]
    assert found.needed_bytes(1)["model.onnx"] == 1000
    whole = replace(found, parts=undivided(found.files))
    manifest.write(whole, folder)
    assert manifest.read(folder).needed_bytes(1)["model.onnx.data"] == 20_000


def test_verify_reports_progress_up_to_the_end(folder: Path) -> None:
    calls: list[tuple[int, int]] = []
    found = verify(folder, lambda done, total: calls.append((done, total)))
    assert calls[-1] == (found.total_bytes, found.total_bytes)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_write_refuses_what_read_would(folder: Path) -> None:
    found = manifest.read(folder)
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(BundleError, match="group_size is 7"):
        manifest.write(replace(found, group_size=7), folder)
    assert (folder / "manifest.json").read_bytes() == before


def test_budget_check() -> None:
    budget = Budget(3.0, 8.0, 4.0)
    assert budget.check(3, "b") == 3.0
    with pytest.raises(UsageError, match="average bits nan: b takes a number from 3 to 8"):
        budget.check(float("nan"), "b")


def test_manifest_is_plain_data(folder: Path) -> None:
    json.dumps(asdict(manifest.read(folder)))
