"""Runs bundles: ``Engine`` on each kind of engine that a bundle has, ``Session`` on plain ONNX Runtime."""

from __future__ import annotations

from .engine import Engine
from .generation import FinishReason, Generation, GenerationStats, Likelihood, Sampling, TokenListener
from .grammar import Grammar
from .kept_context import KeptContext
from .prompt import Prompt
from .score import Passes, Score, Window
from .session import Session

__all__ = [
    "Engine",
    "FinishReason",
    "Generation",
    "GenerationStats",
    "Grammar",
    "KeptContext",
    "Likelihood",
    "Passes",
    "Prompt",
    "Sampling",
    "Score",
    "Session",
    "TokenListener",
    "Window",
]
