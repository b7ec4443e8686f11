"""A model with short convolutions: its state from pass to pass, in sessions, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from family_exports import FamilyExport
from tiny_models import write_checkpoint

from mbq_export.cli import command
from mbq_runtime import BundleError, Engine, UsageError
from mbq_runtime.bundle import genai_config
from mbq_runtime.bundle.genai_config import cache_bytes, read_settings
from mbq_runtime.engine import Session
from mbq_runtime.engine.load import open_bundle

pytestmark = pytest.mark.heavy

RNG = np.random.default_rng(5)
TALK = RNG.integers(0, 256, 150).tolist()  # more than one pass of a prompt
TIE = 1e-3


@pytest.fixture(scope="module")
def bundle(families: Callable[[str], FamilyExport]) -> Path:
    return families("lfm2").host


@pytest.fixture(scope="module", params=["onnx", "tvm"])
def engine(bundle: Path, request: pytest.FixtureRequest) -> Engine:
    return Engine.load(bundle, engine=request.param)


def test_token_by_token_is_one_pass(engine: Engine, bundle: Path) -> None:
    reply = engine.generate(TALK, max_tokens=15, avg_bits=8)
    reply.text()
    said = reply.stats.tokens
    rows = Session(bundle).run([*TALK, *said], 8.0).logits[len(TALK) - 1 : -1]
    assert (rows.max(1) - rows[np.arange(len(said)), said] <= TIE * np.abs(rows).max()).all()


def test_a_session_goes_on_or_begins_again(engine: Engine) -> None:
    session = engine.session()
    first = engine.generate(TALK, max_tokens=6, avg_bits=8, session=session)
    first.text()
    longer = [*TALK, *first.stats.tokens, 7, 8, 9]
    others = [*TALK[:100], 1, 2, 3]  # a convolution cannot go back to the 100th token
    near = [*others[:95], 4, 5]  # onnxruntime-genai cannot go back with convolutions alone
    for prompt, kept in ((longer, len(longer) - 4), (others, 0), (near, 87 if engine._backend.marks else 0)):
        reply = engine.generate(prompt, max_tokens=6, avg_bits=8, session=session)
        assert reply.text() == engine.generate(prompt, max_tokens=6, avg_bits=8).text()
        assert reply.stats.cached_tokens == kept


def test_what_cannot_be_taken_back_is_said(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="states of this model cannot be taken back"):
        engine.speculate = "on"
    engine.speculate = "auto"
    assert engine.speculate == "off"
    with pytest.raises(UsageError, match="states of this model are not written to a file"):
        engine.save_session(engine.session(), tmp_path / "kept")


def test_attention_alone_has_a_cache(bundle: Path) -> None:
    manifest = Engine.load(bundle).manifest
    assert cache_bytes(manifest, read_settings(bundle, manifest)) == 2 * 4 * 1 * 2 * 32


@pytest.mark.parametrize("changes", [{"conv_cache_size": 3}, {"layer_types": ["conv"] * 3}, {"conv_cache_size": "2"}])
def test_another_state_is_refused(bundle: Path, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    document = json.loads((bundle / "genai_config.json").read_text(encoding="utf-8"))
    document["model"]["decoder"] |= changes
    monkeypatch.setattr(genai_config, "read_json", lambda path, most: document)
    with pytest.raises(BundleError, match=r"conv_cache_size|layer_types|past\.0\.conv"):
        open_bundle(bundle, None)


def test_a_gpu_is_refused_before_any_work(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "lfm2", "lfm2")
    options = ["--model", model, "--output", tmp_path / "bundle", "--target", "webgpu", "--dry-run"]
    with pytest.raises(UsageError, match="target webgpu: short convolutions have no GPU kernel; choose"):
        command([str(option) for option in options], standalone_mode=False)
