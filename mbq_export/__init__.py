"""The workstation side: a checkpoint goes in, bundles come out.

>>> from mbq_export import export
>>> manifests = export("smollm2-135m", ["arm64"])                              # doctest: +SKIP

``import mbq_export`` is quick: torch is imported by the first export.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from .export import export

__all__ = ["__version__", "export"]

try:
    __version__ = version("mbq-export")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0"
