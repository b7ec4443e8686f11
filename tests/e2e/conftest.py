"""Engines of the real model on GPUs, each loaded once: a driver for the processor compiles their kernels for long."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import needs
import pytest

from mbq_runtime import Engine

CONTEXT = 128


@pytest.fixture(scope="session")
def gpu_engine(smollm2_bundles: dict[str, Path]) -> Callable[[str], Engine]:
    """By target: the engine of its bundle."""

    @cache
    def loaded(target: str) -> Engine:
        needs.gpu(needs.GPU_ENGINES[target])
        return Engine.load(smollm2_bundles[target], context=CONTEXT, threads=2)

    return loaded
