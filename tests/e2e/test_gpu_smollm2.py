"""The real model on GPU drivers that run on the processor: OpenCL through PoCL, a short step through WebGPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mbq_runtime import Engine

pytestmark = pytest.mark.slow

TIE = 1e-3


@pytest.mark.parametrize(("target", "new_tokens"), [("android-adreno", 32), ("webgpu", 4)])
def test_tokens_are_the_processors(
    smollm2_bundles: dict[str, Path], gpu_engine: Callable[[str], Engine], target: str, new_tokens: int
) -> None:
    on_gpu = gpu_engine(target)
    # Both have keys and values of float32.
    on_cpu = Engine.load(smollm2_bundles["portable"], context=128)
    prompt = on_cpu.encode("The history of the lighthouse begins with fires on hills. " * 6)[:64]
    assert len(prompt) == 64
    reply = on_gpu.generate(prompt, max_tokens=new_tokens, avg_bits=8)
    reply.text()
    said = list(reply.stats.tokens)
    assert len(said) == new_tokens
    logits = on_cpu.logits([*prompt, *said], 8.0).logits[len(prompt) - 1 : -1]
    assert (logits.max(1) - logits[np.arange(new_tokens), said] <= TIE * np.abs(logits).max()).all()
    assert reply.stats.avg_bits_used == pytest.approx(8.0)
