"""The device side of mbq-export: runs bundles and measures them.

>>> from mbq_runtime import Engine
>>> engine = Engine.load("my-bundle")
>>> for piece in engine.generate("Tell me a story", avg_bits=4.0):
...     print(piece, end="", flush=True)
Hi, wörld!

The controller is in ``mbq_runtime.control``, the sensors in ``mbq_runtime.sensing``, and the format of a bundle in
``mbq_runtime.bundle``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import BundleError, MbqError, UsageError

if TYPE_CHECKING:
    from .engine import Engine, Generation, GenerationStats

    __version__: str

__all__ = ["BundleError", "Engine", "Generation", "GenerationStats", "MbqError", "UsageError", "__version__"]

_ENGINE_NAMES = ("Engine", "Generation", "GenerationStats")


def __getattr__(name: str) -> object:
    # numpy and the metadata of packages take a tenth of a second to import: only callers that need them pay for it.
    if name in _ENGINE_NAMES:
        from . import engine

        return getattr(engine, name)
    if name == "__version__":
        from .version import installed_version

        return installed_version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
