"""The device side: reads bundles, runs them, measures them.  Imports nothing from the exporter.

>>> from mbq_runtime import Engine
>>> engine = Engine.load("my-bundle")                                       # doctest: +SKIP
>>> for piece in engine.generate("Tell me a story", avg_bits=4.0):          # doctest: +SKIP
...     print(piece, end="", flush=True)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import BundleError, MbqError, UsageError

if TYPE_CHECKING:
    from .engine import Engine, Generation, GenerationStats

__all__ = ["BundleError", "Engine", "Generation", "GenerationStats", "MbqError", "UsageError"]

_ENGINE_NAMES = ("Engine", "Generation", "GenerationStats")


def __getattr__(name: str) -> object:
    # ONNX Runtime takes a quarter of a second to import: only those who run a model pay for it.
    if name in _ENGINE_NAMES:
        from . import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
