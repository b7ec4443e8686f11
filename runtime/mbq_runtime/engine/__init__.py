"""Runs bundles: ``Engine`` on any kind of engine the bundle has, ``Session`` on plain ONNX Runtime."""

from __future__ import annotations

from .engine import Engine, Window
from .generation import Generation, GenerationStats
from .session import Session

__all__ = ["Engine", "Generation", "GenerationStats", "Session", "Window"]
