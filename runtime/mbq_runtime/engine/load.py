"""The checks that a bundle passes before a native library is loaded."""

from __future__ import annotations

import os
from pathlib import Path

from mbq_runtime.bundle import isa
from mbq_runtime.bundle.check import check_bundle
from mbq_runtime.bundle.manifest import Manifest, read
from mbq_runtime.errors import BundleError, UsageError
from mbq_runtime.pull import local_folder

MOST_THREADS = max(256, os.cpu_count() or 1)
"""More take the memory of their stacks, and give nothing."""


def open_bundle(folder: str | os.PathLike[str], threads: int | None) -> tuple[Path, Manifest]:
    """Read a bundle's manifest, and check all of the bundle but the hashes of its files.

    Args:
        folder: folder of the bundle, in which ``~`` is expanded, or a source that ``mbq pull`` takes.
        threads: processor threads that are asked for, or None.

    Returns:
        The bundle's absolute path, and its manifest.

    Raises:
        BundleError: the bundle is incomplete, too new, not for this machine, on a noexec mount, or cannot be pulled.
        UsageError: ``threads`` is below 1, or above ``MOST_THREADS``.
    """
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise UsageError(f"threads {threads}: needed a whole number from 1 to {MOST_THREADS}")
    path = Path(os.path.expanduser(local_folder(os.fspath(folder))))
    manifest = read(path)
    isa.check(manifest.target)
    check_bundle(path, manifest)
    if manifest.native and (problem := isa.mount_problem(path)):
        raise BundleError(problem)
    return path.resolve(), manifest
