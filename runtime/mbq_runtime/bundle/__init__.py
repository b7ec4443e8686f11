"""The format of a bundle: its manifest, and the checks of its files.

>>> from mbq_runtime.bundle import read_manifest
>>> manifest = read_manifest("my-bundle")
>>> manifest.budget.min_bits, manifest.budget.max_bits, manifest.engines
(3.0, 8.0, ('onnx',))
"""

from __future__ import annotations

from .check import check_contents
from .facts import Budget, Linear, ModelFacts, Quality, QualityPoint, RouterFacts, TargetFacts, Weights
from .listed_files import FileEntry, FileRange, file_entries
from .manifest import Manifest
from .manifest import read as read_manifest
from .manifest import write as write_manifest
from .slice_profile import SliceProfile
from .verify import check_sizes
from .verify import verify as verify_bundle

__all__ = [
    "Budget",
    "FileEntry",
    "FileRange",
    "Linear",
    "Manifest",
    "ModelFacts",
    "Quality",
    "QualityPoint",
    "RouterFacts",
    "SliceProfile",
    "TargetFacts",
    "Weights",
    "check_contents",
    "check_sizes",
    "file_entries",
    "read_manifest",
    "verify_bundle",
    "write_manifest",
]
