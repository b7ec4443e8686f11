"""What a bundle's own code is, and who vouches for it.  Said once for each code."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

import click

from mbq_runtime.bundle.manifest import DECODER_LIBRARY, OPS_LIBRARY, FileEntry, Manifest
from mbq_runtime.cache import cache_dir
from mbq_runtime.printable import printable

_GPU_CODE = (".cl", ".wgsl")


def code_files(manifest: Manifest) -> list[FileEntry]:
    """The files of a bundle that are run as programs.

    Args:
        manifest: the bundle's manifest.
    """
    libraries = (OPS_LIBRARY, DECODER_LIBRARY)
    return [entry for entry in manifest.files if entry.name in libraries or entry.name.endswith(_GPU_CODE)]


def description(manifest: Manifest) -> str:
    """What a user must know of a bundle's code, in one line; "" for a bundle without code.

    Args:
        manifest: the bundle's manifest.
    """
    found = code_files(manifest)
    if not found:
        return ""
    names = found[0].name if len(found) == 1 else f"{found[0].name} and {len(found) - 1} more"
    kind = "GPU code" if found[0].name.endswith(_GPU_CODE) else "machine code"
    return f"{kind} of the bundle's maker ({names}), which nobody has checked"


def note_code(bundle: Path) -> None:
    """Say on stderr that a bundle brings code, the first time that this code is run.

    The cache folder keeps the hashes of what was said.  Without one, it is said each time.

    Args:
        bundle: folder of the bundle.

    Raises:
        BundleError: the bundle is broken, or not for this machine.
    """
    from mbq_runtime.bundle.manifest import read
    from mbq_runtime.engine.load import open_bundle

    found = read(bundle)
    files = code_files(found)
    if not files:
        return
    key = hashlib.sha256("".join(sorted(entry.sha256 for entry in files)).encode()).hexdigest()
    mark = cache_dir() / "noted-code" / key
    if mark.exists():
        return
    open_bundle(bundle, None)  # a bundle that is refused runs nothing
    text = f"{bundle}: runs {description(found)}; run it only if you trust its maker (docs/security.md)"
    click.echo(f"note: {printable(text)}", err=True)
    with suppress(OSError):
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
