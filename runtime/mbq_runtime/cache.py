"""The folder that keeps compiled code between runs."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "MBQ_CACHE_DIR"


def cache_dir() -> Path:
    """The folder named by MBQ_CACHE_DIR, or else ``mbq-export`` in the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mbq-export"
