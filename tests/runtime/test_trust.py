"""What of a bundle reaches an engine, and what is said of a bundle's code."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from tiny_bundle import facts, write_manifest

from mbq_runtime import BundleError, Engine
from mbq_runtime.bundle import manifest
from mbq_runtime.bundle.file_names import OPS_LIBRARY
from mbq_runtime.bundle.listed_files import file_entries
from mbq_runtime.commands import trust
from mbq_runtime.engine import load, private
from mbq_runtime.engine.imports import engine_errors
from mbq_runtime.trust import code
from mbq_runtime.trust.pulled import mark_pulled, pulled_from


def test_logits_that_are_no_numbers_end_a_reply(bundle_copy: Path) -> None:
    model = onnx.load(bundle_copy / "model.onnx")
    (head,) = (tensor for tensor in model.graph.initializer if tensor.name == "head")
    values = onnx.numpy_helper.to_array(head).copy()
    values[0, 200] = np.nan
    head.CopyFrom(onnx.numpy_helper.from_array(values, "head"))
    onnx.save(model, bundle_copy / "model.onnx")
    write_manifest(bundle_copy)
    for options in ({}, {"temperature": 1.0, "seed": 1}):
        with pytest.raises(BundleError, match=r"the model's logits are not finite \(nan\)"):
            Engine.load(bundle_copy, threads=1).generate("A", max_tokens=4, **options).text()


def test_the_engine_reads_no_file_of_the_bundle_as_its_configuration(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What changes after the check has no effect."""
    checked = private.read_settings

    def change(path: Path, manifest: Any) -> Any:
        settings = checked(path, manifest)
        (path / "genai_config.json").write_text('{"model": {"decoder": {"filename": "/dev/null"}}}')
        return settings

    monkeypatch.setattr(private, "read_settings", change)
    assert Engine.load(bundle_copy, threads=1).generate("xA", chat=False, max_tokens=3).text() == "BCD"


def test_a_library_is_loaded_only_with_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "manifest.json").write_text("{}")
    library = tmp_path / OPS_LIBRARY
    library.write_bytes(b"code")
    native = replace(facts(), layout="mbq16", files=file_entries(tmp_path))
    copy = private.ops_library(tmp_path, native)
    assert copy is not None
    assert copy.read_bytes() == b"code"
    assert copy == private.ops_library(tmp_path, native)
    assert copy.parent.stat().st_mode & 0o77 == 0
    library.write_bytes(b"kode")
    with pytest.raises(BundleError, match=r"libmbq_ops\.so: its contents differ from the manifest"):
        private.ops_library(tmp_path, native)


def test_code_of_a_bundle_is_announced_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MBQ_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(load, "open_bundle", lambda bundle, threads: None)
    bundle = tmp_path / "bundle"
    (bundle / "lib").mkdir(parents=True)
    for name in ("model.onnx", "genai_config.json", "tokenizer.json", OPS_LIBRARY):
        (bundle / name).write_bytes(name.encode())

    def said(code: bytes) -> str:
        (bundle / OPS_LIBRARY).write_bytes(code)
        manifest.write(replace(facts(), layout="mbq16", files=file_entries(bundle)), bundle)
        trust.note_code(bundle, trust=False)
        return capsys.readouterr().err

    first = said(b"one")
    assert first.startswith(f"note: {bundle}: runs machine code of the bundle's maker ({OPS_LIBRARY})")
    assert first.count("\n") == 1
    assert said(b"one") == ""
    assert said(b"two") == first
    (bundle / "model.onnx").write_bytes(b"other weights")
    assert said(b"two") == ""


@pytest.fixture
def native_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle with a library of its own, whose other files are stand-ins.  The cache is the test's own."""
    monkeypatch.setenv("MBQ_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(load, "open_bundle", lambda bundle, threads: None)
    folder = tmp_path / "bundle"
    (folder / "lib").mkdir(parents=True)
    for name in ("model.onnx", "genai_config.json", "tokenizer.json", OPS_LIBRARY):
        (folder / name).write_bytes(name.encode())
    manifest.write(replace(facts(), layout="mbq16", files=file_entries(folder)), folder)
    return folder


def test_native_code_of_a_pulled_bundle_needs_trust(
    native_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = manifest.read(native_bundle)
    assert private.ops_library(native_bundle, found) is not None, "a bundle of this machine"
    mark_pulled((native_bundle / "manifest.json").read_bytes(), "hf:some/one")
    moved = Path(shutil.copytree(native_bundle, tmp_path / "moved"))
    for folder in (native_bundle, moved):
        with pytest.raises(BundleError, match=r"machine code from hf:some/one, .* is not run; add --trust once"):
            private.ops_library(folder, found)
        trust.note_code(folder, trust=False)
        assert capsys.readouterr().err == "", "one line is said, which is the refusal"
    trust.note_code(moved, trust=True)
    assert private.ops_library(native_bundle, found) is not None, "remembered by the library's hash"
    (native_bundle / OPS_LIBRARY).write_bytes(b"swapped")
    with pytest.raises(BundleError, match="its contents differ from the manifest"):
        private.ops_library(native_bundle, found)
    other = replace(found, files=file_entries(native_bundle))
    manifest.write(other, native_bundle)
    mark_pulled((native_bundle / "manifest.json").read_bytes(), "hf:some/one")
    with pytest.raises(BundleError, match="is not run; add --trust once"):
        private.ops_library(native_bundle, other)


def test_a_library_of_this_release_needs_no_trust(
    native_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = manifest.read(native_bundle)
    mark_pulled((native_bundle / "manifest.json").read_bytes(), "hf:some/one")
    (library,) = code.native_code(found)
    monkeypatch.setattr(code, "known_libraries", lambda: {library.sha256: "rpi5"})
    assert private.ops_library(native_bundle, found) is not None
    trust.note_code(native_bundle, trust=False)
    assert capsys.readouterr().err == ""
    assert code.description(found) == f"machine code that this release of mbq builds ({OPS_LIBRARY})"


def test_a_mark_that_was_damaged_is_a_mark(native_bundle: Path, tmp_path: Path) -> None:
    mark_pulled((native_bundle / "manifest.json").read_bytes(), "hf:some/one")
    (mark,) = (tmp_path / "cache" / "pulled").iterdir()
    for content in (b"", b"\xff", b"[]", b'{"source": 3}'):
        mark.write_bytes(content)
        assert pulled_from(native_bundle) == "an unknown source"


def test_the_list_of_known_libraries() -> None:
    for digest, what in code.known_libraries().items():
        assert code.is_known(digest)
        assert "slices=" in what
    assert not code.is_known("0" * 64)


def test_a_portable_bundle_needs_no_trust(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBQ_CACHE_DIR", str(bundle_copy.parent / "cache"))
    mark_pulled((bundle_copy / "manifest.json").read_bytes(), "hf:some/one")
    assert Engine.load(bundle_copy, threads=1).generate("xA", chat=False, max_tokens=3).text() == "BCD"


def test_a_portable_bundle_has_no_code(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trust.note_code(bundle, trust=False)
    assert capsys.readouterr().err == ""
    assert code.description(manifest.read(bundle)) == ""


def test_names_that_are_not_text_end_in_one_line(bundle_copy: Path) -> None:
    """The engine puts the names of a graph into its messages."""
    path = bundle_copy / "model.onnx"
    path.write_bytes(path.read_bytes().replace(b"GroupQueryAttention", b"GroupQuery\xff\xffttention"))
    write_manifest(bundle_copy)
    with pytest.raises(BundleError, match="not an ONNX file"):
        Engine.load(bundle_copy, threads=1)
    with pytest.raises(BundleError, match="names in its files are not UTF-8"), engine_errors("x"):
        b"\xff".decode()
