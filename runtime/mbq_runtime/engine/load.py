"""The checks that a bundle passes before a native library is loaded."""

from __future__ import annotations

import os
from pathlib import Path

from mbq_runtime.bundle.isa import check, mount_problem
from mbq_runtime.bundle.manifest import Manifest, check_sizes, read
from mbq_runtime.errors import BundleError, UsageError


def open_bundle(folder: str | os.PathLike[str], threads: int | None) -> tuple[Path, Manifest]:
    """Read a bundle's manifest, and refuse what can be refused at low cost.

    Args:
        folder: folder of the bundle; ``~`` is expanded.
        threads: processor threads that are asked for, or None.

    Returns:
        The bundle's absolute path, and its manifest.

    Raises:
        BundleError: the bundle is incomplete, too new, not for this machine, or on a noexec mount.
        UsageError: ``threads`` is below 1.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads {threads}: needed a whole number above 0")
    path = Path(folder).expanduser()
    manifest = read(path)
    check_sizes(path, manifest)
    check(manifest.target)
    if manifest.native and (problem := mount_problem(path)):
        raise BundleError(problem)
    return path.resolve(), manifest
