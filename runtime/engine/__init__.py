"""Runs bundles: ``Engine`` on onnxruntime-genai, ``Session`` on plain ONNX Runtime."""

from __future__ import annotations

from .genai import Engine
from .generation import Generation, GenerationStats
from .session import Session

__all__ = ["Engine", "Generation", "GenerationStats", "Session"]
