"""The whole calibration on a tiny model: it resumes after a kill, and the same inputs give the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from exporting import digests, export, kill_once, run
from tiny_models import TINIEST, write_checkpoint

import mbq_export
from mbq_export.calibrated import FLOOR_DIVERGENCE, FLOOR_SAME_TOP, Calibrated, quality_floor, worth
from mbq_export.export import _store
from mbq_export.format.codes import Sliced
from mbq_export.methods import AUTO_SLICES, Recipe
from mbq_export.model.loading import load
from mbq_export.model.source import locate
from mbq_export.store import Store
from mbq_runtime import Engine
from mbq_runtime.bundle import manifest
from mbq_runtime.bundle.facts import QualityPoint
from mbq_runtime.bundle.slice_profile import SliceProfile

pytestmark = pytest.mark.heavy


@pytest.mark.slow
def test_killed_three_times_it_resumes_to_the_same_bytes(tmp_path: Path, calibration_text: Path) -> None:
    # Four blocks, so that there are steps to kill between.
    model = write_checkpoint(tmp_path / "model", "llama", **{**TINIEST, "num_hidden_layers": 4})
    options = ["--tune-steps", "22", "--router", "norm"]
    run(export(model, calibration_text, tmp_path / "a" / "bundle", *options))
    work = tmp_path / "b" / ".model.3122.calibration"

    def finished() -> int:
        return len(list(work.glob("*.safetensors")))

    for kills in range(1, 4):
        before = finished()
        # Each time it gets at least one step further.
        kill_once(
            export(model, calibration_text, tmp_path / "b" / "bundle", *options),
            lambda before=before: finished() > before,
        )  # type: ignore[misc]
        assert finished() >= kills
        assert not (tmp_path / "b" / "bundle").exists()
    assert "resuming after" in run(export(model, calibration_text, tmp_path / "b" / "bundle", *options))
    assert digests(tmp_path / "a" / "bundle") == digests(tmp_path / "b" / "bundle")
    assert not work.exists()


def test_killed_in_the_second_tuning_it_resumes_to_the_same_bytes(tmp_path: Path, calibration_text: Path) -> None:
    model = write_checkpoint(tmp_path / "model", "llama", **TINIEST)
    options = ["--method", "learned", "--slices", "2,2,2,2", "--tune-steps", "42"]
    said = run(export(model, calibration_text, tmp_path / "a" / "bundle", *options))
    assert "choosing slices after 2 bits" in said
    assert "choosing slices after 4 bits" in said
    assert "tuning with routers" in said
    work = tmp_path / "b" / ".model.2222.calibration"
    for step in ("model.layers.1.after2", "routers for tuning", "tuning with routers", "model.layers.0.after4"):
        kill_once(
            export(model, calibration_text, tmp_path / "b" / "bundle", *options), (work / f"{step}.safetensors").exists
        )
    assert "resuming after" in run(export(model, calibration_text, tmp_path / "b" / "bundle", *options))
    assert digests(tmp_path / "a" / "bundle") == digests(tmp_path / "b" / "bundle")


def test_a_bundle_says_what_every_budget_is_worth(tmp_path: Path, calibration_text: Path) -> None:
    model = write_checkpoint(tmp_path / "model", "llama", **TINIEST)
    ratios = {}
    for method in ("rtn", "nested"):
        options = ["--method", method, "--tune-steps", "8" if method == "nested" else "0"]
        run(export(model, calibration_text, tmp_path / method, *options))
        facts = manifest.read(tmp_path / method)
        quality = facts.quality
        assert [point.asked_bits for point in quality.curve] == [3, 3.5, 4, 5, 6, 8]
        assert all(abs(point.avg_bits_used - point.asked_bits) < 0.5 for point in quality.curve)
        routers = facts.calibration["routers"]
        assert set(routers) == {"static", "norm", "mlp", "random"}
        assert all(of_bits["over_shipped"] == 1 for of_bits in routers[facts.router.kind].values())
        assert 3 <= quality.floor_bits <= 8
        # Full depth is the original but for its rounding.
        assert 0 < quality.curve[-1].kl_divergence < 0.1 * quality.curve[0].kl_divergence
        assert quality.curve[-1].same_top > quality.curve[0].same_top
        ratios[method] = [point.perplexity / quality.reference_perplexity for point in quality.curve]
    # A random model predicts nothing, so no budget changes its perplexity much.
    assert all(0.9 < ratio < 1.1 for of_method in ratios.values() for ratio in of_method)


def test_auto_calibrates_with_both_profiles_and_writes_the_better(tmp_path: Path, calibration_text: Path) -> None:
    model = write_checkpoint(tmp_path / "model", "llama", **TINIEST)
    said = run(export(model, calibration_text, tmp_path / "out" / "auto", "--slices", "auto", "--tune-steps", "4"))
    facts = manifest.read(tmp_path / "out" / "auto")
    tried = facts.calibration["slices"]
    assert list(tried) == list(AUTO_SLICES)
    chosen = min(tried, key=lambda slices: (tried[slices]["floor_bits"], tried[slices]["kl_divergence"]))
    assert facts.slices == SliceProfile.parse(chosen).slices
    assert f"Slices {chosen} are written" in said
    assert all(f"Slices {slices}: floor {tried[slices]['floor_bits']:g} bits" in said for slices in tried)
    # The bundle equals the one that these slices give alone.  Nothing of the other profile is left.
    run(export(model, calibration_text, tmp_path / "out" / "alone", "--slices", chosen, "--tune-steps", "4"))
    alone, auto = digests(tmp_path / "out" / "alone"), digests(tmp_path / "out" / "auto")
    assert {name: alone[name] for name in alone if name != "manifest.json"}.items() <= auto.items()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["alone", "auto"]


def point(bits: float, perplexity: float, kl_divergence: float = 0.0, same_top: float = 1.0) -> QualityPoint:
    return QualityPoint(bits, bits, perplexity, kl_divergence, same_top)


def calibrated(*curve: QualityPoint) -> Calibrated:
    return Calibrated(
        SliceProfile((3, 1, 2, 2)), 64, "norm", {}, None, np.ones(1, np.float32),
        reference_perplexity=10.0, curve=curve,
    )  # fmt: skip


@pytest.mark.parametrize(("ratio", "floor"), [(1.0, 8.0), (1.1, 6.0), (2.0, 4.0), (4.0, 3.0), (2.0**1.5, 3.5)])
def test_the_floor_is_where_the_curve_crosses_the_ratio(ratio: float, floor: float) -> None:
    found = calibrated(point(3, 40, 0.2), point(4, 20, 0.1), point(6, 11, 0.02), point(8, 10.5, 0.01))
    assert quality_floor(found, ratio) == pytest.approx(floor, abs=0.051)
    of_slices, of_rest = worth(found, ratio)
    assert of_slices == quality_floor(found, ratio)
    assert of_rest == pytest.approx((0.1 + 0.06 + 0.02 + 0.01) / 4)


def test_the_floor_is_no_lower_than_the_divergence_and_the_first_choices_allow() -> None:
    diverging = calibrated(point(3, 10, 2 * FLOOR_DIVERGENCE), point(4, 10, FLOOR_DIVERGENCE / 2), point(8, 10, 0.001))
    assert quality_floor(diverging, 1.25) == pytest.approx(3.5, abs=0.051)
    other = FLOOR_SAME_TOP - 0.1
    choosing = calibrated(point(3, 10, 0.1, other), point(4, 10, 0.1, FLOOR_SAME_TOP + 0.1), point(8, 10, 0.001))
    assert quality_floor(choosing, 1.25) == pytest.approx(3.5, abs=0.051)


def test_a_store_forgets_what_was_tampered_with_and_what_was_made_of_other_inputs(tmp_path: Path) -> None:
    codes, factors = np.arange(64, dtype=np.uint8).reshape(2, 32), np.ones((2, 4), np.float16)
    sliced = Sliced(codes, *np.ones((2, 2, 1), np.uint8), factors)
    store = Store(tmp_path / "work", "inputs")
    assert store.get("block") is None
    store.put("block", {"unit": sliced})
    again = Store(tmp_path / "work", "inputs").get("block")
    assert again is not None
    np.testing.assert_array_equal(again["unit"].codes, sliced.codes)
    path = tmp_path / "work" / "block.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert Store(tmp_path / "work", "inputs").get("block") is None
    assert Store(tmp_path / "work", "other inputs").get("block") is None
    assert not path.exists()


@pytest.mark.parametrize("hashes", ["7", "true", '["block"]', '"block"', "null"])
def test_a_store_whose_index_is_damaged_begins_again(
    tmp_path: Path, hashes: str, caplog: pytest.LogCaptureFixture
) -> None:
    index = tmp_path / "work" / "steps.json"
    index.parent.mkdir()
    index.write_text(f'{{"fingerprint": "inputs", "sha256": {hashes}}}')
    store = Store(tmp_path / "work", "inputs")
    assert store.get("block") is None
    assert store.finished == 0
    assert len(caplog.messages) == 1
    assert f"{index}: field 'sha256' is " in caplog.text
    assert "needed: an object; the calibration begins again" in caplog.text


@pytest.mark.parametrize(
    ("name", "change", "same"),
    [
        ("llama", {}, True),
        ("llama", {"_name_or_path": "elsewhere", "dtype": "bfloat16"}, True),
        ("llama", {"rms_norm_eps": 0.5}, False),
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}, False),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, False),
        ("mistral", {"sliding_window": 400}, False),
        ("gemma3_text", {"query_pre_attn_scalar": 4000}, False),
        ("granite", {"residual_multiplier": 0.5}, False),
    ],
)
def test_steps_of_a_model_whose_config_was_edited_are_not_resumed(
    name: str, change: dict[str, object], same: bool, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / name, name)
    recipe = Recipe(SliceProfile((3, 1, 2, 2)), 64)
    prepared: Any = SimpleNamespace(
        options=SimpleNamespace(outputs={tmp_path / "bundle": None}), source=SimpleNamespace(name=name)
    )

    def fingerprint() -> str:
        store = _store(prepared, load(locate(str(folder))), recipe, np.zeros((1, 8), np.int64))
        return store.fingerprint

    before = fingerprint()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    assert (fingerprint() == before) == same


@pytest.mark.heavy
@pytest.mark.parametrize("method", ["rtn", "nested"])
def test_one_slice_has_nothing_to_route(method: str, calibration_text: Path, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "llama", "llama")
    mbq_export.export(
        model, ["portable"], output=tmp_path / "bundle", slices="8", method=method, calib_data=str(calibration_text),
        calib_tokens=1024,
    )  # fmt: skip
    engine = Engine.load(tmp_path / "bundle")
    assert (engine.manifest.slices, engine.manifest.router.kind) == ((8,), "static")
    assert engine.logits([1, 2, 3], 8.0).avg_bits_used == 8
