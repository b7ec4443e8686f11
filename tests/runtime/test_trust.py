"""What of a bundle reaches an engine, and what is said of a bundle's code."""

from __future__ import annotations

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
from mbq_runtime.bundle.manifest import OPS_LIBRARY, file_entries
from mbq_runtime.commands import trust
from mbq_runtime.engine import load, private
from mbq_runtime.engine.imports import engine_errors


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
        trust.note_code(bundle)
        return capsys.readouterr().err

    first = said(b"one")
    assert first.startswith(f"note: {bundle}: runs machine code of the bundle's maker ({OPS_LIBRARY})")
    assert first.count("\n") == 1
    assert said(b"one") == ""
    assert said(b"two") == first
    (bundle / "model.onnx").write_bytes(b"other weights")
    assert said(b"two") == ""


def test_a_portable_bundle_has_no_code(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trust.note_code(bundle)
    assert capsys.readouterr().err == ""
    assert trust.description(manifest.read(bundle)) == ""


def test_names_that_are_not_text_end_in_one_line(bundle_copy: Path) -> None:
    """The engine puts the names of a graph into its messages."""
    path = bundle_copy / "model.onnx"
    path.write_bytes(path.read_bytes().replace(b"GroupQueryAttention", b"GroupQuery\xff\xffttention"))
    write_manifest(bundle_copy)
    with pytest.raises(BundleError, match="not an ONNX file"):
        Engine.load(bundle_copy, threads=1)
    with pytest.raises(BundleError, match="names in its files are not UTF-8"), engine_errors("x"):
        b"\xff".decode()
