"""Calibration on another device than the processor: every tensor must be where the model is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import TINIEST, write_checkpoint

from mbq_export import devices

pytestmark = pytest.mark.heavy

HERE = Path(__file__).parent
# Error feedback takes a step for each channel, and every step there runs in Python.  The MLP has two groups of 32.
MODEL = {**TINIEST, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16}

MISUSES = """
import torch
from other_device import other_device

with other_device() as device:
    there, here = torch.ones(3, device=device), torch.ones(3)
    assert there.device.type == "other"
    assert (there + there[:1].cpu().sum()).cpu().tolist() == [2, 2, 2]
    for misuse in (lambda: there + here, lambda: here.add_(there), lambda: torch.cat([here, there]), there.numpy):
        try:
            misuse()
        except (RuntimeError, TypeError):
            continue
        raise SystemExit("a misuse passed")
"""


def script(*arguments: str) -> str:
    """Run Python in a process of its own, because torch cannot forget a device.  Returns its stdout."""
    done = subprocess.run([sys.executable, *arguments], cwd=HERE, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_other_device_refuses_what_a_gpu_would() -> None:
    script("-c", MISUSES)


@pytest.mark.parametrize(
    ("family", "layers", "method", "codes", "first_codes", "perplexity"),
    [
        # It does all that other methods do.
        pytest.param("llama", 1, "learned", 0.15, 0.05, 0.1, marks=pytest.mark.slow),
        ("gemma3_text", 2, "rtn", 1e-4, 1e-4, 1e-4),
        ("phi3", 2, "rtn", 1e-4, 1e-4, 1e-4),
    ],
)
def test_a_calibration_there_is_one_here(
    tmp_path: Path, family: str, layers: int, method: str, codes: float, first_codes: float, perplexity: float
) -> None:
    """codes, first_codes, perplexity: limits of relative differences of weights, the first block's weights, curves."""
    model = write_checkpoint(tmp_path / "model", family, **{**MODEL, "num_hidden_layers": layers})
    found = json.loads(script("other_device.py", str(model), method))
    # Sums have another order, so a code at the edge of its cell may change, and feedback spreads this.
    assert max(found["apart"].values()) < codes
    assert all(apart < first_codes for unit, apart in found["apart"].items() if unit.startswith("layers.0."))
    assert found["there"] == pytest.approx(found["here"], rel=perplexity)


def test_auto_takes_a_gpu_that_has_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.choose("cpu", 1 << 60) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.choose("auto", 0) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 << 30, 24 << 30))
    assert devices.choose("auto", 7 << 30) == "cuda"
    assert devices.choose("auto", 9 << 30) == "cpu"
