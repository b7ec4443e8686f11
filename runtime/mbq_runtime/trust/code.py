"""A bundle's own code: what it is, and whether it may run.

Native code of a pulled bundle runs if this release knows its hash, or if the user said so once.  The known hashes are
those of the libraries that this release builds.  ``tests/tools/known_libraries.py`` makes their list.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from mbq_runtime.bundle.file_names import DECODER_LIBRARY, OPS_LIBRARY
from mbq_runtime.bundle.listed_files import FileEntry
from mbq_runtime.bundle.manifest import Manifest
from mbq_runtime.bundle.reading import read_json
from mbq_runtime.cache import cache_dir
from mbq_runtime.errors import BundleError

from .pulled import pulled_from

KNOWN_LIBRARIES = "known_libraries.json"
_MOST_LIST_BYTES = 1 << 20
_GPU_CODE = (".cl", ".wgsl")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def native_code(manifest: Manifest) -> list[FileEntry]:
    """The files of a bundle that the processor runs.

    Args:
        manifest: the bundle's manifest.
    """
    return [entry for entry in manifest.files if entry.name in (OPS_LIBRARY, DECODER_LIBRARY)]


def gpu_code(manifest: Manifest) -> list[FileEntry]:
    """The files of a bundle that a GPU's driver compiles.

    Args:
        manifest: the bundle's manifest.
    """
    return [entry for entry in manifest.files if entry.name.endswith(_GPU_CODE)]


@cache
def known_libraries() -> dict[str, str]:
    """The libraries that this release builds: {sha256: target and options}."""
    document = read_json(Path(__file__).with_name(KNOWN_LIBRARIES), _MOST_LIST_BYTES)
    return dict(document["libraries"])


def is_known(sha256: str) -> bool:
    """Whether a library is one that this release builds.

    Args:
        sha256: of the library.
    """
    return sha256 in known_libraries()


def description(manifest: Manifest) -> str:
    """What a user must know of a bundle's code, in one line; "" for a bundle without code.

    Args:
        manifest: the bundle's manifest.
    """
    found = [*native_code(manifest), *gpu_code(manifest)]
    if not found:
        return ""
    names = found[0].name if len(found) == 1 else f"{found[0].name} and {len(found) - 1} more"
    if all(is_known(entry.sha256) for entry in found):
        return f"machine code that this release of mbq builds ({names})"
    kind = "machine code" if native_code(manifest) else "GPU code"
    return f"{kind} of the bundle's maker ({names}), which nobody has checked"


def trust(manifest: Manifest) -> None:
    """Let a bundle's native code run on this machine from now on.

    Args:
        manifest: the bundle's manifest.

    Raises:
        BundleError: the cache folder cannot be written.
    """
    for entry in native_code(manifest):
        mark = _mark(entry.sha256)
        try:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError as error:
            raise BundleError(
                f"{mark}: cannot be written ({error.strerror}); set MBQ_CACHE_DIR to a folder that can"
            ) from None


def check_trusted(folder: Path, name: str, sha256: str) -> None:
    """Refuse native code of a pulled bundle that neither this release nor the user knows.

    Args:
        folder: of the bundle.
        name: of the library.
        sha256: of its content.

    Raises:
        BundleError: the code must not run.
    """
    source = pulled_from(folder)
    if source is None or is_known(sha256) or _mark(sha256).exists():
        return
    raise BundleError(
        f"{folder / name}: machine code from {source}, which this mbq does not know (sha256 {sha256[:12]}...), is not "
        "run; add --trust once if you trust its maker, or take a bundle for portable"
    )


def _mark(sha256: str) -> Path:
    assert _SHA256.fullmatch(sha256)
    return cache_dir() / "trusted-code" / sha256
