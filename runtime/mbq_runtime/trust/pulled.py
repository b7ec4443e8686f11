"""Marks of the bundles that came from elsewhere.

``pulled/HASH.json`` in the cache folder marks a bundle by the SHA-256 of its manifest.  The mark stays when
the bundle's folder is moved, copied or removed.
"""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path

from mbq_runtime.bundle.file_names import MANIFEST_NAME
from mbq_runtime.bundle.manifest import MOST_MANIFEST_BYTES
from mbq_runtime.bundle.reading import parse_json, read_file
from mbq_runtime.cache import cache_dir
from mbq_runtime.errors import BundleError
from mbq_runtime.whole_file import write_whole

UNKNOWN = "an unknown source"
_MOST_MARK_BYTES = 1 << 16


def mark_pulled(content: bytes, source: str) -> None:
    """Remember that a bundle came from elsewhere.

    Args:
        content: of its manifest.
        source: where it came from.

    Raises:
        BundleError: the cache folder cannot be written.
    """
    path = _mark(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps({"source": source}) + "\n").encode())
    except OSError as error:
        raise BundleError(
            f"{path}: cannot be written ({error.strerror}); set MBQ_CACHE_DIR to a folder that can"
        ) from None


def pulled_from(folder: Path) -> str | None:
    """Where a bundle was pulled from; None for one that was not pulled on this machine.

    Args:
        folder: of the bundle.

    Raises:
        BundleError: the manifest cannot be read.
    """
    mark = _mark(read_file(folder / MANIFEST_NAME, MOST_MANIFEST_BYTES))
    if not os.path.lexists(mark):
        return None
    try:
        document = parse_json(read_file(mark, _MOST_MARK_BYTES))
    except (BundleError, ValueError):
        return UNKNOWN  # a mark that cannot be read is a mark
    source = document.get("source") if isinstance(document, dict) else None
    return source if isinstance(source, str) else UNKNOWN


def _mark(content: bytes) -> Path:
    return cache_dir() / "pulled" / f"{sha256(content).hexdigest()}.json"
