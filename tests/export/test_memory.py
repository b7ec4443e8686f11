"""An export's memory: what it says and what it takes, and large models that are never in memory whole."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import TINIEST, write_checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig

from mbq_export import memory
from mbq_export.cli import command
from mbq_export.methods import METHODS
from mbq_export.model.describe import describe
from mbq_export.model.loading import load
from mbq_export.model.source import locate
from mbq_export.plan import Plan
from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_runtime.errors import ModelError

PROFILE = SliceProfile((3, 1, 2, 2))

WIDE = """
import sys, threading, time
from dataclasses import replace
from pathlib import Path
import numpy as np
from mbq_export import memory, methods, plan
from mbq_export.calibrate import calibrate
from mbq_export.context import Calibration
from mbq_export.model.loading import load
from mbq_export.model.source import locate
from mbq_export.store import Store
from mbq_runtime.bundle.slice_profile import SliceProfile

peak = 0

def watch():
    global peak
    while True:
        with open("/proc/self/status") as status:
            peak = max(peak, next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon")))
        time.sleep(0.01)

model, work, memory.KEPT_WEIGHT_BYTES, method = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
threading.Thread(target=watch, daemon=True).start()
profile = SliceProfile((2, 2, 2, 2) if method == "learned" else (3, 1, 2, 2))
methods.METHODS[method] = replace(methods.METHODS[method], sweeps=1)
checkpoint = load(locate(model), None if memory.KEPT_WEIGHT_BYTES else work)
rng = np.random.default_rng(0)
fitted, held_back = (rng.integers(0, 4000, (2, methods.CONTEXT_TOKENS)) for _ in range(2))
planned = plan.Plan(checkpoint.decoder, profile, 64, "mbq16", "auto", fitted.size, methods.tunings(method, profile, 2))
steps = Store(work / "steps", "wide")
calibrate(Calibration(checkpoint, methods.Recipe(profile, 64, method, 2), steps), fitted, held_back)
print(peak, planned.peak_memory_bytes, checkpoint.parameters)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kept", "method", "ffn"),
    [(0, "nested", 3072), (memory.KEPT_WEIGHT_BYTES, "learned", 2304)],
)
def test_a_wide_model_takes_the_memory_that_was_stated(tmp_path: Path, kept: int, method: str, ffn: int) -> None:
    """Two blocks about a third as wide as those of a model of a billion weights, which only has more of them."""
    folder = write_checkpoint(
        tmp_path / "wide", "llama", hidden_size=768, intermediate_size=ffn, num_attention_heads=12,
        num_key_value_heads=6, head_dim=64, num_hidden_layers=2, vocab_size=4000, max_position_embeddings=2048,
    )  # fmt: skip
    command = [sys.executable, "-c", WIDE, str(folder), str(tmp_path / "work"), str(kept), method]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak, stated, parameters = map(int, done.stdout.split())
    print(
        f"\n{peak / 1e9:.2f} GB at most, {stated / 1e9:.2f} stated, {peak / parameters:.1f} bytes for each of "
        f"{parameters / 1e6:.0f} M weights, which are in {'memory' if kept else 'a file'}"
    )
    assert 0.8 * stated <= peak <= 1.2 * stated


def resident_bytes() -> int:
    return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").open() if line.startswith("RssAnon"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc keeps what others give back by themselves")
def test_what_lies_free_below_what_is_in_use_is_given_back() -> None:
    arrays = [np.ones(8192) for _ in range(2000)]  # too small for memory of their own
    taken = sum(array.nbytes for array in arrays)
    del arrays[:-1]
    before = resident_bytes()
    memory.give_back()
    assert before - resident_bytes() > 0.9 * taken


REUSE = """
import resource, sys
import torch
from mbq_export import memory
if sys.argv[1] == "reuse":
    memory.reuse_freed()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(1 << 24)
before = faults()
for _ in range(10):
    torch.ones(1 << 24)
print((faults() - before) * resource.getpagesize() / (10 << 26))
"""
"""Prints the share of new pages in blocks of 64 MB, each of which was freed before the next."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others choose by themselves")
@pytest.mark.parametrize(("how", "least", "most"), [("reuse", 0, 0.6), ("as by default", 0.95, 1.1)])
def test_large_blocks_take_the_pages_of_freed_ones(how: str, least: float, most: float) -> None:
    """Not all: an aligned block does not always fit where another one was."""
    said = subprocess.run([sys.executable, "-c", REUSE, how], capture_output=True, text=True, check=True).stdout
    assert least <= float(said) <= most


def large(hidden: int, ffn: int, layers: int, tied: bool) -> Plan:
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=tied, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    return Plan(describe(config, "large"), PROFILE, 64, "mbq16", "auto", METHODS["learned"].calib_tokens)


@pytest.mark.parametrize(
    ("plan", "weights", "gib"),
    [(large(2048, 8192, 16, tied=True), 1.2e9, 8), (large(4096, 14336, 32, tied=False), 8e9, 20)],
)
def test_large_models_take_less_memory_than_their_weights(plan: Plan, weights: float, gib: int) -> None:
    assert plan.parameters > weights
    assert plan.peak_memory_bytes < gib << 30
    assert plan.weights_file_bytes == 4 * plan.parameters
    assert plan.work_bytes > plan.weights_file_bytes + plan.routed_parameters


def stored_as_bfloat16(folder: Path, family: str, **changes: object) -> str:
    write_checkpoint(folder, family, **changes)
    AutoModelForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3-longrope"])
def test_a_model_in_a_file_is_the_same_model(tmp_path: Path, family: str) -> None:
    source = locate(stored_as_bfloat16(tmp_path / "model", family))
    inside, outside = load(source), load(source, tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []  # the file has no name
    for kind in ("named_parameters", "named_buffers"):
        expected, found = dict(getattr(inside.model, kind)()), dict(getattr(outside.model, kind)())
        assert list(expected) == list(found)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)
    tokens = torch.arange(24)[None]
    torch.testing.assert_close(outside.model(tokens).logits, inside.model(tokens).logits, rtol=0, atol=1e-5)
    assert outside.parameters == inside.parameters


@pytest.mark.heavy
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_model_in_a_file_becomes_the_same_bundle(
    tmp_path: Path, calibration_text: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stored_as_bfloat16(tmp_path / "model", family, **TINIEST, head_dim=32)
    weights = []
    for kept in (memory.KEPT_WEIGHT_BYTES, 0):
        monkeypatch.setattr(memory, "KEPT_WEIGHT_BYTES", kept)
        output = tmp_path / str(kept)
        arguments = ["--target", "portable", "--model", model, "--output", str(output), "--tune-steps", "3"]
        command([*arguments, "--calib-data", str(calibration_text), "--calib-tokens", "2048"], standalone_mode=False)
        weights.append(np.fromfile(output / "model.onnx.data", np.uint8))
    np.testing.assert_array_equal(*weights)


def test_no_room_for_the_weights_is_said_before_they_are_written(tmp_path: Path) -> None:
    source = locate(stored_as_bfloat16(tmp_path / "model", "llama"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(ModelError, match=r"work: \d+ MB for the model's weights cannot be had \(.*\); free some"):
            load(source, tmp_path / "work")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "work").iterdir()) == []
