"""Bundles with keys and values of 8 bits: both engines, sessions, memory, and what they change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from agreement import divergence
from family_exports import FamilyExport
from numpy.typing import NDArray
from tiny_models import write_checkpoint

from mbq_export.cli import command
from mbq_export.model.loading import load
from mbq_export.model.recording import rounded_cache
from mbq_export.model.source import locate
from mbq_runtime import BundleError, Engine, UsageError
from mbq_runtime.bundle import manifest
from mbq_runtime.bundle.genai_config import FILE
from mbq_runtime.cli import main

pytestmark = pytest.mark.heavy

# Stacked projections and a tied head; windows, a soft cap and norms behind branches; short convolutions.
FAMILIES = ("llama", "gemma2", "lfm2", "ministral3")
TEXT = np.random.default_rng(5).integers(0, 256, 150).tolist()  # more than one pass of a prompt
# A number at the border of two codes gets either, so a few logits may differ by more than float32 sums do.
BETWEEN_ENGINES = 0.03
BETWEEN_ENGINES_KL = 1e-6  # nats a token
MOST_KL = 2e-3  # nats a token
TIE = 2e-3

Logits = NDArray[np.float64]


Bundles = Callable[[str], Path]


@pytest.fixture(scope="module")
def model(families: Callable[[str], FamilyExport]) -> Path:
    return families("llama").model


@pytest.fixture(scope="module")
def llama(bundles_8_bits: Bundles) -> Path:
    return bundles_8_bits("llama")


@pytest.mark.parametrize("name", FAMILIES)
def test_both_engines_say_the_same_token_by_token(name: str, bundles_8_bits: Bundles) -> None:
    onnx, compiled = (Engine.load(bundles_8_bits(name), engine=engine) for engine in ("onnx", "tvm"))
    reply = onnx.generate(TEXT, max_tokens=20, avg_bits=8, chat=False)
    reply.text()
    whole = [*TEXT, *reply.stats.tokens]
    for bits in (3.0, 8.0):
        ours, theirs = compiled.logits(whole, bits).logits, onnx.logits(whole, bits).logits
        assert np.abs(ours - theirs).max() <= BETWEEN_ENGINES * np.abs(theirs).max()
        assert divergence(theirs, ours) <= BETWEEN_ENGINES_KL
    said = np.asarray(reply.stats.tokens)
    steps = theirs[len(TEXT) - 1 : -1]
    assert (steps.max(1) - steps[np.arange(len(said)), said] <= TIE * np.abs(steps).max()).all()


def test_little_is_changed(llama: Path, families: Callable[[str], FamilyExport]) -> None:
    """From the same weights with float32 keys and values, and from the original with rounded ones."""
    exact = families("llama")
    of_rounded, of_exact = (Engine.load(path).logits(TEXT, 8.0).logits for path in (llama, exact.host))
    assert 0 < divergence(of_exact, of_rounded) < MOST_KL
    checkpoint = load(locate(str(exact.model)))
    with torch.no_grad():
        original = checkpoint.model(torch.tensor([TEXT])).logits[0].numpy()
        with rounded_cache(checkpoint):
            changed = checkpoint.model(torch.tensor([TEXT])).logits[0].numpy()
        assert np.array_equal(original, checkpoint.model(torch.tensor([TEXT])).logits[0].numpy())
    assert 0 < divergence(original, changed) < MOST_KL
    assert divergence(original, of_rounded) < divergence(original, of_exact) + MOST_KL


@pytest.mark.parametrize("engine", ["onnx", "tvm"])
def test_a_session_says_what_an_empty_context_says(engine: str, llama: Path, tmp_path: Path) -> None:
    """Also behind a rewind into the middle of a block of the cache."""
    loaded = Engine.load(llama, engine=engine)
    session, talk = loaded.session(), list(TEXT)
    for turn in range(3):
        replies = [loaded.generate(talk, max_tokens=8, avg_bits=8, session=kept) for kept in (session, None)]
        assert replies[0].text() == replies[1].text()
        assert replies[0].stats.cached_tokens == (len(talk) - 4 if turn < 2 and turn else 100 if turn else 0)
        talk += [*replies[0].stats.tokens, 5, 6, 7]
        if turn == 1:
            talk[100:] = [9, 9, 9]
    if engine == "tvm":
        file = tmp_path / "talk.session"
        loaded.save_session(session, file)
        again = loaded.load_session(file)
        assert again.tokens == session.tokens
        replies = [loaded.generate(talk, max_tokens=8, avg_bits=8, session=kept) for kept in (again, None)]
        assert replies[0].text() == replies[1].text()


def test_memory_is_as_computed(
    llama: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 layers of 2 heads with keys and values of 32 channels and a scale each."""
    each_token = 2 * 2 * 2 * (32 + 4)
    found = manifest.read(llama)
    assert found.kv_bits == 8
    for engine in ("onnx", "tvm"):
        loaded = Engine.load(llama, engine=engine)
        assert loaded._backend.token_bytes == each_token
    context = loaded._backend.start(1000, np.array([8, 4], np.float32))
    assert sum(part.nbytes for part in context.kept(1008)) == 1008 * each_token
    assert main(["inspect", str(llama)]) == 0
    assert "each takes 0.3 kB of memory (8-bit keys and values)" in capsys.readouterr().out
    assert main(["inspect", str(llama), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["context_bytes"] == {"each_token": each_token, "states": 0}
    command(
        ["--model", str(model), "--target", "host", "--kv", "8", "--dry-run", "--json"],
        standalone_mode=False,
    )
    plan = json.loads(capsys.readouterr().out)
    assert (plan["kv_bits"], plan["context_bytes"]["each_token"]) == (8, each_token)


@pytest.mark.parametrize(
    ("target", "family", "bits"), [("arm64", "llama", 8), ("portable", "llama", 32), ("arm64", "gemma4_text", 32)]
)
def test_the_default_is_what_there_are_kernels_for(
    target: str, family: str, bits: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Blocks of Gemma 4 share keys and values, which are in float32 alone."""
    source = write_checkpoint(tmp_path / family, family)
    command(["--model", str(source), "--target", target, "--dry-run", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["kv_bits"] == bits


@pytest.mark.parametrize("target", ["portable", "webgpu"])
def test_targets_without_kernels_are_refused(target: str, model: Path) -> None:
    with pytest.raises(UsageError, match=f"--kv 8: {target} has float32 keys and values alone; leave it out"):
        command(["--model", str(model), "--target", target, "--kv", "8", "--dry-run"], standalone_mode=False)


def test_a_bundle_of_other_rows_is_refused(llama: Path, tmp_path: Path) -> None:
    """The graph, genai_config.json and the manifest must say the same of the cache."""
    copy = shutil.copytree(llama, tmp_path / "copy")
    text = (copy / manifest.MANIFEST_NAME).read_text()
    (copy / manifest.MANIFEST_NAME).write_text(text.replace('"kv_bits": 8', '"kv_bits": 32'))
    with pytest.raises(BundleError, match=r"head_size|past_key_values.0.key|shape for"):
        Engine.load(copy)
    (copy / manifest.MANIFEST_NAME).write_text(text.replace('"kv_bits": 8', '"kv_bits": 16'))
    with pytest.raises(BundleError, match=r"kv_bits is 16, needed one of \(8, 32\)"):
        manifest.read(copy)
    assert json.loads((llama / FILE).read_text())["model"]["decoder"]["head_size"] == 36
