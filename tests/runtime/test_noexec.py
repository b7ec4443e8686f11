"""Bundles with libraries on a mount from which no program can be loaded, and systems without engines."""

from __future__ import annotations

import json
import os
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_bundle import write_manifest

from mbq_runtime import BundleError, Engine, cli
from mbq_runtime.bundle import isa, manifest
from mbq_runtime.bundle.file_names import OPS_LIBRARY
from mbq_runtime.engine import load


@pytest.fixture
def noexec(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mount has the flag noexec."""
    real = os.statvfs

    def statvfs(path: Any) -> os.statvfs_result:
        values = list(real(path))
        values[8] |= os.ST_NOEXEC
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", statvfs)


@pytest.fixture
def native(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle that carries kernels for this machine."""
    monkeypatch.setattr(manifest.Manifest, "native", True)
    (bundle_copy / "lib").mkdir()
    (bundle_copy / OPS_LIBRARY).write_bytes(b"no program")
    settings = json.loads((bundle_copy / "genai_config.json").read_bytes())
    settings["model"]["decoder"]["session_options"]["custom_ops_library"] = OPS_LIBRARY
    (bundle_copy / "genai_config.json").write_text(json.dumps(settings))
    write_manifest(bundle_copy)
    return bundle_copy


@pytest.mark.usefixtures("noexec")
def test_a_bundle_on_a_noexec_mount_is_refused(native: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"{native} lies on a noexec mount, from which no library can be loaded; copy it elsewhere"
    with pytest.raises(BundleError, match="lies on a noexec mount"):
        load.open_bundle(native, None)
    assert cli.main(["run", str(native), "A"]) == 4
    assert capsys.readouterr().err == f"mbq: error: {words}\n"
    assert cli.main(["inspect", str(native)]) == 0
    assert f"no: {words}" in capsys.readouterr().out
    assert cli.main(["inspect", str(native), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["runs_here"], found["problem"]) == (False, words)
    assert cli.main(["verify", str(native)]) == 0
    assert f"note: {words}" in capsys.readouterr().out


@pytest.mark.usefixtures("noexec")
def test_a_bundle_without_libraries_runs_from_a_noexec_mount(bundle: Path) -> None:
    assert Engine.load(bundle, threads=1).generate("A", chat=False, max_tokens=3).text() == "BCD"


def test_a_mount_that_permits_programs(native: Path) -> None:
    assert load.open_bundle(native, None)[0] == native.resolve()
    assert isa.mount_problem(native / "nowhere") is None


def test_inspect_says_what_a_system_lacks(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = sysconfig.get_config_var
    monkeypatch.setattr(sysconfig, "get_config_var", lambda key: 4 if key == "SIZEOF_VOID_P" else real(key))
    assert cli.main(["inspect", str(bundle)]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if line.split()[1:])
    assert "32-bit Python with glibc; this Python is a 32-bit program" in lines["machine"]
    assert "the engines need 64 bits" in lines["machine"]
    with pytest.raises(BundleError, match="install a 64-bit system"):
        Engine.load(bundle, threads=1)
    assert str(replace(isa.this_machine(), pointer_bits=64)).endswith("64-bit Python with glibc")
