"""The real model on GPU drivers that run on the processor: OpenCL through PoCL, a short step through WebGPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mbq_runtime import Engine, UsageError

pytestmark = pytest.mark.slow

CONTEXT = 128
TIE = 1e-3


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "mbq_export.cli", "--method", "rtn", "--router", "norm", "--calib-tokens", "4096"]
    for target in ("host", "android-adreno", "webgpu"):
        command += ["--target", target]
    done = subprocess.run([*command, "--output", str(folder)], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    return folder


def loaded(bundles: Path, target: str) -> Engine:
    try:
        return Engine.load(bundles / f"smollm2-135m-{target}", context=CONTEXT)
    except UsageError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("target", "new_tokens"), [("android-adreno", 32), ("webgpu", 4)])
def test_tokens_are_the_processors(bundles: Path, target: str, new_tokens: int) -> None:
    on_cpu = Engine.load(bundles / "smollm2-135m-host", context=CONTEXT)
    prompt = on_cpu.encode("The history of the lighthouse begins with fires on hills. " * 6)[:64]
    assert len(prompt) == 64
    reply = loaded(bundles, target).generate(prompt, max_tokens=new_tokens, avg_bits=8)
    reply.text()
    said = list(reply.stats.tokens)
    assert len(said) == new_tokens
    logits = on_cpu.logits([*prompt, *said], 8.0).logits[len(prompt) - 1 : -1]
    assert (logits.max(1) - logits[np.arange(new_tokens), said] <= TIE * np.abs(logits).max()).all()
    assert reply.stats.avg_bits_used == pytest.approx(8.0)
