"""Every family through the command line: the bundle says what the model it was made from says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import needs
import numpy as np
import pytest
import torch
from family_exports import FamilyExport, export, recorded_errors
from said_tokens import logits_in_parts
from tiny_models import EVERY_PART, MODELS, write_checkpoint
from transformers import AutoModelForCausalLM

from mbq_export.cli import command
from mbq_export.model.loading import load
from mbq_export.model.recording import relative_error
from mbq_export.model.source import locate
from mbq_runtime import Engine, UsageError
from mbq_runtime.engine import Session

pytestmark = pytest.mark.heavy

PROMPT = np.random.default_rng(5).integers(0, 256, 20).tolist()
NEW_TOKENS = 20
LOWERED = 1e-3
"""Relative error of the logits beside transformers with the same rounded weights."""
# Tuning on a text that repeats itself moves random weights on other tokens.
TUNED = 0.3
TIE = 1e-3


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3", "qwen3_5_text"])
def test_a_tuned_bundle_says_what_its_model_says(name: str, calibration_text: Path, tmp_path: Path) -> None:
    source, bundle = write_checkpoint(tmp_path / name, name), tmp_path / "bundle"
    arguments = ["--target", "portable", "--model", source, "--output", bundle, "--calib-data", calibration_text]
    arguments += ["--calib-tokens", 1024, "--method", "nested", "--tune-steps", 4, "--router", "static", "--json"]
    with recorded_errors() as errors:
        command([str(argument) for argument in arguments], standalone_mode=False)
    assert_room(errors)

    # Step by step, in a cache written in place, past a sliding window: what one pass says.
    engine = Engine.load(bundle)
    reply = engine.generate(PROMPT, max_tokens=NEW_TOKENS, avg_bits=8)
    reply.text()
    said = reply.stats.tokens
    assert len(said) == NEW_TOKENS
    window = Session(bundle).run([*PROMPT, *said], 8.0)
    steps = window.logits[len(PROMPT) - 1 : -1]
    assert (steps.max(1) - steps[np.arange(NEW_TOKENS), said] <= TIE * np.abs(steps).max()).all()
    assert window.avg_bits_used == pytest.approx(8.0)
    assert 3 < engine.score([*PROMPT, *said], 4.0).avg_bits_used < 6

    with torch.no_grad():
        original = load(locate(str(source))).model(torch.tensor([[*PROMPT, *said]])).logits[0].numpy()
    assert np.linalg.norm(window.logits - original) < TUNED * np.linalg.norm(original)


def assert_room(errors: dict[str, float]) -> None:
    """The checks of an export found less than half of what they allow."""
    # Of transformed weights, of slices, and of a bundle, as a whole and part by part.
    assert len(errors) == 4
    assert max(errors.values()) < 0.5


@pytest.fixture(scope="module", params=MODELS)
def family(request: pytest.FixtureRequest, families: Callable[[str], FamilyExport]) -> FamilyExport:
    return families(request.param)


def test_right_exports_pass_with_room(family: FamilyExport) -> None:
    """The export itself compares the bundles with the sliced model, on 300 tokens."""
    assert_room(family.check_errors)


def test_every_engine_computes_what_transformers_does(family: FamilyExport) -> None:
    assert_computes(family.loaded(), family.model.name, family.rounded)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY_PART)
def test_gpus_compute_what_transformers_does(
    name: str, families: Callable[[str], FamilyExport], tmp_path: Path
) -> None:
    """On a driver for the processor; or the family is refused."""
    needs.gpu("webgpu")
    family = families(name)
    if not family.gpus:
        with pytest.raises(UsageError, match="have no GPU kernel"):
            export(family.model, tmp_path / "bundle", "--target", "webgpu")
        return
    assert_computes([Engine.load(family.gpus["webgpu"])], name, family.rounded, count=1)


def assert_computes(engines: Iterable[Engine], name: str, rounded: Path, *, count: int = 3) -> None:
    """Engines have the logits of transformers' own class with the bundle's weights.

    Args:
        engines: of bundles of one model.
        name: a key of ``MODELS``.
        rounded: folder of the checkpoint with rounded weights.
        count: of texts.
    """
    # Transformers rotates longer texts by other angles, and the bundle's whole context by these.
    tokens, together = (40, 30) if name == "phi3-longrope" else (200, 180)
    texts = np.random.default_rng(3).integers(0, 256, (count, tokens))
    model = AutoModelForCausalLM.from_pretrained(rounded, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(torch.from_numpy(texts)).logits.numpy()
    for engine in engines:
        # Most of a text in long passes, the rest token by token.
        found = np.stack([logits_in_parts(engine, text, together) for text in texts])
        for part in (slice(together), slice(together, tokens)):
            assert relative_error(wanted[:, part], found[:, part]) < LOWERED, (engine.name, engine.path)
        assert 3 < engine.score(texts[0].tolist(), 4.0).avg_bits_used < 6
