"""The page that runs a bundle in a browser, on WebGPU.

The page is in ``site/``, which ``make web`` builds from the sources in the folder ``web/`` of the project.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from mbq_runtime.bundle.check import check_bundle
from mbq_runtime.bundle.file_names import MANIFEST_NAME, SIGNATURE_NAME, TRIM_NAME
from mbq_runtime.bundle.manifest import Manifest, read
from mbq_runtime.errors import BundleError, UsageError
from mbq_runtime.progress import Progress

__all__ = [
    "APP_FILE", "BUNDLE", "ENGINE", "SITE", "app_document", "bundle_files", "check_for_browsers", "write_site",
]  # fmt: skip

ENGINE = "webgpu"
BUNDLE = "bundle"
"""Folder of the bundle beside the page."""
APP_FILE = "app.json"
"""What the page must know of its bundle before it reads it."""


def _site() -> dict[str, Traversable]:
    folder = files(__package__).joinpath("site")
    return {entry.name: entry for entry in folder.iterdir()} if folder.is_dir() else {}


SITE = _site()
"""The files of the page, by name."""


def check_for_browsers(folder: Path) -> Manifest:
    """Read the manifest of a bundle, and check that a browser can run it.

    Args:
        folder: folder of the bundle.

    Raises:
        BundleError: the bundle is broken.
        UsageError: it has no kernels for WebGPU.
    """
    manifest = read(folder)
    if ENGINE not in manifest.engines:
        raise UsageError(
            f"{folder}: the bundle is for {', '.join(manifest.engines)}, a browser needs {ENGINE}; export it with "
            f"mbq-export --target {ENGINE}"
        )
    check_bundle(folder, manifest)
    return manifest


def app_document(manifest: Manifest) -> str:
    """The content of ``app.json``.

    Args:
        manifest: of the bundle.
    """
    return json.dumps({"bundle": f"./{BUNDLE}/", "depth": manifest.deepest if manifest.trimmed else None}) + "\n"


def bundle_files(folder: Path, manifest: Manifest) -> Iterator[tuple[str, int]]:
    """(name, bytes) of the files of a bundle that are served.

    Args:
        folder: folder of the bundle.
        manifest: of the bundle.
    """
    for name in (MANIFEST_NAME, SIGNATURE_NAME, TRIM_NAME):
        if (folder / name).is_file():
            yield name, (folder / name).stat().st_size
    for entry in manifest.held_files:
        yield entry.name, entry.size


def write_site(bundle: Path, output: Path, progress: Progress | None = None) -> Manifest:
    """Write the page and a bundle to a folder that any file server can offer.

    Args:
        bundle: folder of the bundle.
        output: the folder; it must not exist, or be empty.
        progress: called with (bytes that are written, bytes in all).

    Returns:
        The bundle's manifest.

    Raises:
        BundleError: the bundle is broken, or the disk is full.
        UsageError: the bundle has no kernels for WebGPU, or the folder has files, or no name.
    """
    if not output.name:
        raise UsageError(f"{output}: it has no name; choose another --output, and write its name")
    manifest = check_for_browsers(bundle)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output}: it exists and is not empty; choose another --output")
    if not SITE:
        raise UsageError("this installation has no page: run make web, or install the wheel")
    listed = dict(bundle_files(bundle, manifest))
    done, total = 0, sum(listed.values())
    draft = output.with_name(f".{output.name}.part")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        for name, size in listed.items():
            place = draft / BUNDLE / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle / name, place)
            done += size
            if progress is not None:
                progress(done, total)
        for name, file in SITE.items():
            (draft / name).write_bytes(file.read_bytes())
        (draft / APP_FILE).write_text(app_document(manifest), encoding="utf-8")
        (draft / ".nojekyll").touch()  # GitHub Pages would leave files out
        if output.exists():
            output.rmdir()
        draft.rename(output)
    except OSError as error:
        raise BundleError(
            f"{output}: writing failed at {error.filename or output} ({error.strerror or error}); free some space, or "
            "choose another --output"
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return manifest
