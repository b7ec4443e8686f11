"""Bundles from elsewhere: fetched chunk by chunk, checked against the manifest, and kept in the cache folder."""

from __future__ import annotations

from .incoming import Incoming
from .pull import Pulled, local_folder, place_of, pull, trim
from .sources import Source, is_source
from .store import Kept, listed, remove

__all__ = [
    "Incoming",
    "Kept",
    "Pulled",
    "Source",
    "is_source",
    "listed",
    "local_folder",
    "place_of",
    "pull",
    "remove",
    "trim",
]
