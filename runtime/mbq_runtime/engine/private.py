"""Private folders: what a native engine reads instead of a bundle's own settings and library.

The engine follows more of a configuration than this project checks.  Therefore it gets a configuration of checked
values, and a copy of the library whose hash was compared.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mbq_runtime.bundle.genai_config import FILE, read_settings
from mbq_runtime.bundle.manifest import Manifest
from mbq_runtime.bundle.onnx_file import without_absent
from mbq_runtime.bundle.reading import read_file
from mbq_runtime.cache import cache_dir
from mbq_runtime.errors import BundleError, UsageError
from mbq_runtime.trust.code import check_trusted

GRAPH = "model.onnx"
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""Setting of ONNX Runtime: the folder of the weights of a graph that is no file.

onnxruntime-genai takes it relative to its configuration."""
LINK = "bundle"
_MOST_LIBRARY_BYTES = 64 << 20

_folders: dict[str, tempfile.TemporaryDirectory[str]] = {}
_lock = threading.Lock()


def check_library(path: Path, manifest: Manifest, name: str) -> bytes:
    """Check a library before it is loaded: its hash is that of the manifest, and it may run on this machine.

    Args:
        path: folder of the bundle.
        manifest: the bundle's manifest.
        name: of the library.

    Returns:
        Content of the library.

    Raises:
        BundleError: the hashes differ, the file cannot be read, or the user has not trusted a pulled bundle's code.
    """
    (entry,) = (entry for entry in manifest.files if entry.name == name)
    content = read_file(path / name, _MOST_LIBRARY_BYTES)
    digest = hashlib.sha256(content).hexdigest()
    if digest != entry.sha256:
        raise BundleError(
            f"{path / name}: its contents differ from the manifest (sha256 {digest[:12]}..., needed "
            f"{entry.sha256[:12]}...); copy or export the bundle again"
        )
    check_trusted(path, name, digest)
    return content


def private_library(path: Path, manifest: Manifest, name: str) -> Path:
    """A checked copy of a bundle's library.

    All engines of a bundle in this process share one copy, because its number of threads is global.  It is removed when
    the process ends.  The loader knows a library by its path, so another bundle in the same place needs another path.

    Args:
        path: folder of the bundle.
        manifest: the bundle's manifest.
        name: of the library.

    Raises:
        BundleError: as for ``check_library``.
        UsageError: there is no folder for the copy.
    """
    content = check_library(path, manifest, name)
    with _lock:
        copy = Path(_folder(hashlib.sha256(content).hexdigest(), executable=True), Path(name).name)
        if not copy.exists():
            copy.write_bytes(content)
    return copy


def ops_library(path: Path, manifest: Manifest) -> Path | None:
    """As ``private_library``, of the operators for ONNX Runtime; None for a bundle without them.

    Args:
        path: folder of the bundle.
        manifest: the bundle's manifest.
    """
    return None if manifest.ops_library is None else private_library(path, manifest, manifest.ops_library)


def trimmed_graph(path: Path, manifest: Manifest) -> bytes | None:
    """The graph of a trimmed bundle, for an engine that is told by ``WEIGHTS_FOLDER`` where the weights are.

    Args:
        path: folder of the bundle.
        manifest: the bundle's manifest.

    Returns:
        Content of the graph, none of whose tensors lies behind the end of a file; None for a whole bundle.

    Raises:
        BundleError: the graph cannot be read.
    """
    if not manifest.trimmed:
        return None
    return without_absent(path / GRAPH, {entry.name: entry.size for entry in manifest.held_files})


@contextmanager
def engine_folder(path: Path, manifest: Manifest, session: Mapping[str, Any]) -> Iterator[Path]:
    """The folder from which onnxruntime-genai loads a bundle.

    Args:
        path: folder of the bundle.
        manifest: the bundle's manifest.
        session: settings of ONNX Runtime's session.

    Yields:
        A folder with ``genai_config.json``, a link to the bundle, and the library.
    """
    document = read_settings(path, manifest).document(manifest)
    library = ops_library(path, manifest)
    with _lock:
        folder = library.parent if library is not None else Path(_folder("portable", executable=False))
        link, file = folder / LINK, folder / FILE
        decoder = document["model"]["decoder"]
        decoder["filename"] = f"{LINK}/{decoder['filename']}"
        decoder["session_options"] |= session
        if library is not None:
            # The engine takes a library only from the folder of its configuration.
            decoder["session_options"]["custom_ops_library"] = library.name
        file.write_text(json.dumps(document))
        link.symlink_to(path, target_is_directory=True)
        try:
            yield folder
        finally:
            link.unlink()
            file.unlink()


def _folder(key: str, *, executable: bool) -> str:
    """The private folder for a key.  executable: libraries can be loaded from it."""
    if key not in _folders or not os.path.isdir(_folders[key].name):
        _folders[key] = _new_folder(executable)
    return _folders[key].name


def _new_folder(executable: bool) -> tempfile.TemporaryDirectory[str]:
    for base in (tempfile.gettempdir, cache_dir, lambda: "/dev/shm"):
        try:
            place = os.fspath(base())
            os.makedirs(place, exist_ok=True)
            if not (executable and os.statvfs(place).f_flag & os.ST_NOEXEC):
                return tempfile.TemporaryDirectory(prefix="mbq-", dir=place)
        except OSError:
            continue
    raise UsageError("no folder for temporary files from which a library can be loaded; set TMPDIR to one")
