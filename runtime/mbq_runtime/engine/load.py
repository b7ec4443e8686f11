"""The checks that a bundle passes before a native library is loaded."""

from __future__ import annotations

import os
from pathlib import Path

from mbq_runtime.bundle import isa
from mbq_runtime.bundle.check import check_bundle
from mbq_runtime.bundle.manifest import Manifest, read
from mbq_runtime.errors import BundleError, UsageError
from mbq_runtime.pull import local_folder


def open_bundle(folder: str | os.PathLike[str], threads: int | None) -> tuple[Path, Manifest]:
    """Read a bundle's manifest, and check all of the bundle but the hashes of its files.

    Args:
        folder: folder of the bundle, in which ``~`` is expanded, or a source that ``mbq pull`` takes.
        threads: processor threads that are asked for, or None.

    Returns:
        The bundle's absolute path, and its manifest.

    Raises:
        BundleError: the bundle is incomplete, too new, not for this machine, on a noexec mount, or cannot be pulled.
        UsageError: ``threads`` is below 1.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads {threads}: needed a whole number above 0")
    path = local_folder(os.fspath(folder)).expanduser()
    manifest = read(path)
    isa.check(manifest.target)
    check_bundle(path, manifest)
    if manifest.native and (problem := isa.mount_problem(path)):
        raise BundleError(problem)
    return path.resolve(), manifest
