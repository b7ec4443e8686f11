"""The check of a bundle for each kind of target: right bundles pass, and a broken lowering is named by its layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import write_checkpoint

from mbq_export import export
from mbq_export.calibrate import calibrate
from mbq_export.calibrated import Calibrated
from mbq_export.context import Calibration
from mbq_export.lower import decoder as walk
from mbq_export.lower.builder import Attention, Gate
from mbq_export.methods import Recipe
from mbq_export.model import recording
from mbq_export.model.checkpoint import Checkpoint
from mbq_export.model.loading import load
from mbq_export.model.shape import Decoder
from mbq_export.model.source import locate
from mbq_export.options import Options
from mbq_export.prepare import prepare
from mbq_export.slicing import rtn
from mbq_export.write import bundle, check
from mbq_runtime import BundleError, Engine
from mbq_runtime.bundle import manifest as bundle_manifest
from mbq_runtime.bundle.isa import Machine
from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_runtime.engine.private import ops_library
from mbq_runtime.errors import ModelError
from mbq_runtime.trust import code
from mbq_runtime.trust.pulled import mark_pulled

pytestmark = pytest.mark.heavy

PROFILE = SliceProfile.parse("3,1,2,2")


class Written:
    """A calibrated tiny model, of which bundles can be written."""

    def __init__(self, folder: Path, name: str, text: Path, **changes: object) -> None:
        self.folder, self.text = folder, text
        self.model = write_checkpoint(folder / name, name, **changes)
        self.checkpoint = load(locate(str(self.model)))
        tokens = np.array(self.checkpoint.tokenizer(text.read_text(encoding="utf-8"))["input_ids"][:2048])
        recipe = Recipe(PROFILE, 64, "rtn", None, "norm", 0)
        windows = tokens.reshape(-1, 256)
        self.calibrated = calibrate(Calibration(self.checkpoint, recipe), windows[:4], windows[4:])

    def write(self, target: str, calibrated: Calibrated | None = None, engine: str = "onnx") -> Path:
        output = self.folder / f"{target}-{engine}"
        options = Options.of(
            self.model, [target], output=output, engine=engine, slices=str(PROFILE), group_size=64, activation_bits=16,
            method="rtn", tune_steps=None, router="norm", floor_ratio=1.25, calib_data=str(self.text),
            calib_tokens=1024, device="cpu", seed=0, force=True,
        )  # fmt: skip
        bundle.write_bundle(prepare(options), output, self.checkpoint, calibrated or self.calibrated, calibration={})
        return output


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, calibration_text: Path) -> Callable[[str], Written]:
    """Makes a model once, by its name in ``MODELS``."""
    made: dict[str, Written] = {}

    def of(name: str) -> Written:
        if name not in made:
            made[name] = Written(tmp_path_factory.mktemp(name), name, calibration_text)
        return made[name]

    return of


@pytest.mark.parametrize(("name", "target"), [("gemma3_text", "arm64"), ("llama", "rpi4")])
def test_bundles_for_other_processors_pass(name: str, target: str, written: Callable[[str], Written]) -> None:
    """Those for this one: ``test_every_family.py``."""
    assert (written(name).write(target) / "manifest.json").is_file()


def test_where_a_rotation_turns_neighbours_in_a_part_of_a_head_the_order_is_that_of_engines(
    tmp_path: Path, calibration_text: Path
) -> None:
    """Keys of 8 bits are rounded after their channels are mixed, so another order is another rounding."""
    of = Written(tmp_path, "glm4", calibration_text, initializer_range=0.1)  # attention that is sharp enough to tell
    assert of.checkpoint.decoder.family.interleaved
    for engine in ("onnx", "tvm"):
        assert (of.write("host", engine=engine) / "manifest.json").is_file()


@pytest.mark.parametrize("target", ["host", "portable"])
def test_linear_layers_with_biases_that_read_the_stream_themselves(
    target: str, tmp_path: Path, calibration_text: Path
) -> None:
    of = Written(tmp_path, "olmo2", calibration_text, attention_bias=True)
    assert of.calibrated.units["layers.0.attn_in"].bias is not None
    assert (of.write(target) / "manifest.json").is_file()


def changed_attention(monkeypatch: pytest.MonkeyPatch, layer: int, change: Callable[[Attention], Attention]) -> None:
    make = walk._attention

    def changed(decoder: Decoder, of: int) -> Attention:
        return change(make(decoder, of)) if of == layer else make(decoder, of)

    monkeypatch.setattr(walk, "_attention", changed)


def wrong_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    changed_attention(monkeypatch, 1, lambda attention: replace(attention, rotary="sliding_attention"))


def window_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    changed_attention(monkeypatch, 1, lambda attention: replace(attention, window=(attention.window or 0) + 1))


def no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    changed_attention(monkeypatch, 0, lambda attention: replace(attention, window=None))


def attention_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    changed_attention(monkeypatch, 1, lambda attention: replace(attention, scale=attention.scale * 1.02))


def no_norm_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = Checkpoint.norm

    def without(checkpoint: Checkpoint, name: str) -> Any:
        return norm(checkpoint, name) - (name == "model.layers.1.pre_feedforward_layernorm")

    monkeypatch.setattr(Checkpoint, "norm", without)


def no_embedding_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "embedding_scale", property(lambda _: 1.0, lambda _, value: None))


def other_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    class Swapped(Gate):
        def __new__(cls, name: str, activation: str) -> Gate:  # type: ignore[misc]
            return Gate(name, "silu" if name == "layers.1.mlp.gated" else activation)

    monkeypatch.setattr(walk, "Gate", Swapped)


def head_without_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head's final scaling is off, as a soft cap that is left out would leave it."""
    final_norm = Checkpoint.norm

    def scaled(checkpoint: Checkpoint, name: str) -> Any:
        return final_norm(checkpoint, name) * (1.01 if name == "model.norm" else 1)

    monkeypatch.setattr(Checkpoint, "norm", scaled)


LOWERINGS = {
    "rope": ("gemma3_text", wrong_rope, "layers.1 attention"),
    "window off by one": ("mistral-sliding", window_off_by_one, "layers.1 attention"),
    "no window": ("gemma3_text", no_window, "layers.0 attention"),
    "norm offset": ("gemma3_text", no_norm_offset, "layers.1 MLP"),
    "embedding scale": ("gemma3_text", no_embedding_scale, "embedding"),
    "activation": ("gemma3_text", other_activation, "layers.1 MLP"),
    "attention scale": ("qwen3", attention_scale, "layers.1 attention"),
    "head's scaling": ("llama", head_without_its_input, "head"),
}


def refusal(of: Written, target: str = "host", calibrated: Calibrated | None = None, engine: str = "onnx") -> str:
    """What an export says that must fail.  It leaves nothing of the bundle."""
    before = sorted(of.folder.iterdir())
    with pytest.raises(ModelError) as caught:
        of.write(target, calibrated, engine)
    assert sorted(of.folder.iterdir()) == before
    return str(caught.value)


@pytest.mark.parametrize("target", ["host", "portable"])
@pytest.mark.parametrize("broken", LOWERINGS)
def test_a_broken_lowering_is_named(
    broken: str, target: str, written: Callable[[str], Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, mutate, place = LOWERINGS[broken]
    of = written(name)
    mutate(monkeypatch)
    assert f"the first difference is in {place} (" in refusal(of, target)


@pytest.mark.parametrize("target", ["host", "portable"])
def test_a_dropped_bias_is_named(target: str, written: Callable[[str], Written]) -> None:
    of = written("qwen2")
    units = dict(of.calibrated.units)
    assert units["layers.1.attn_in"].bias is not None
    units["layers.1.attn_in"] = replace(units["layers.1.attn_in"], bias=None)
    assert "the first difference is in layers.1 attention (" in refusal(of, target, replace(of.calibrated, units=units))


@pytest.mark.parametrize(("target", "engine"), [("host", "onnx"), ("host", "tvm"), ("portable", "onnx")])
def test_another_head_is_named(target: str, engine: str, written: Callable[[str], Written]) -> None:
    of = written("qwen3")
    units = dict(of.calibrated.units)
    rolled = units["head"].sliced.rows(np.roll(np.arange(of.checkpoint.decoder.vocab_size), 1))
    units["head"] = replace(units["head"], sliced=rolled)
    said = refusal(of, target, replace(of.calibrated, units=units), engine)
    assert "the first difference is in head (" in said
    assert "likeliest next tokens are others" in said


def test_a_tied_head_in_place_of_the_model_s_own_is_found_before_it_is_sliced(tmp_path: Path) -> None:
    """The checkpoint has a head of its own, and the description says that it is tied."""
    checkpoint = load(locate(str(write_checkpoint(tmp_path / "model", "qwen3"))))
    checkpoint.decoder = replace(checkpoint.decoder, tied=True)
    windows = np.random.default_rng(0).integers(0, 256, (4, 128))
    recipe = Recipe(PROFILE, 64, "nested", 0, "norm", 0)
    with pytest.raises(ModelError, match=r"transformed wrongly; the first difference is in head \("):
        calibrate(Calibration(checkpoint, recipe), windows, windows)


def test_slices_of_another_model_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = load(locate(str(write_checkpoint(tmp_path / "model", "llama"))))
    right = rtn.slice_weight

    def of_another(weight: Any, group_size: int, profile: SliceProfile, name: str) -> Any:
        return right(-weight if name == "layers.0.mlp_in" else weight, group_size, profile, name)

    monkeypatch.setattr(rtn, "slice_weight", of_another)
    windows = np.random.default_rng(0).integers(0, 256, (4, 128))
    with pytest.raises(ModelError, match=r"at 8 bits .* first difference is in layers\.0 MLP \("):
        calibrate(Calibration(checkpoint, Recipe(PROFILE, 64, "rtn", None, "norm", 0)), windows, windows)


def test_another_bundle_in_the_same_place_has_libraries_of_its_own(tmp_path: Path, calibration_text: Path) -> None:
    """The loader knows a library by its path, and keeps it as long as the process lives."""
    model, output = write_checkpoint(tmp_path / "llama", "llama"), tmp_path / "bundle"
    found = []
    for group_size in (64, 32):
        export(
            model, ["host"], output=output, engine="both", group_size=group_size, method="rtn", router="static",
            calib_data=str(calibration_text), calib_tokens=1024, force=True,
        )  # fmt: skip
        found.append([Engine.load(output, engine=name).logits([1, 2, 3], 8.0).logits for name in ("onnx", "tvm")])
    for onnx, tvm in found:
        np.testing.assert_allclose(onnx, tvm, atol=0.02 * np.abs(onnx).max())
    assert np.abs(found[0][0] - found[1][0]).max() > 1e-4


def test_what_was_exported_here_runs_here_also_when_it_was_pulled(
    tmp_path: Path, calibration_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MBQ_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(code, "known_libraries", dict)
    folder = Written(tmp_path, "llama", calibration_text).write("host")
    manifest = bundle_manifest.read(folder)
    mark_pulled((folder / "manifest.json").read_bytes(), "file:elsewhere")
    assert ops_library(folder, manifest) is not None
    (mark,) = (tmp_path / "cache" / "trusted-code").iterdir()
    mark.unlink()
    with pytest.raises(BundleError, match="machine code from file:elsewhere"):
        ops_library(folder, manifest)


def test_a_missing_stop_token_is_named(written: Callable[[str], Written], monkeypatch: pytest.MonkeyPatch) -> None:
    of = written("llama")
    tokenizer = of.checkpoint.tokenizer
    monkeypatch.setattr(
        tokenizer, "chat_template", "{% for m in messages %}<bos>{{ m.content }}<bos>\n{% endfor %}", raising=False
    )
    output = of.write("portable")
    assert json.loads((output / "genai_config.json").read_text())["model"]["eos_token_id"] == [257, 256]
    monkeypatch.setattr(bundle, "_eos_token_ids", lambda checkpoint: [257])
    with pytest.raises(ModelError, match=r"genai_config.json: eos_token_id is \[257\]; \[256, 257\] is needed"):
        of.write("portable")
    # Also where the list of stop tokens itself has an error.
    monkeypatch.setattr(check, "stop_token_ids", lambda *_: [257])
    with pytest.raises(ModelError, match=r"\[256, 257\] is needed"):
        of.write("portable")


def test_a_machine_without_kernels_of_its_own_checks_stock_operators(
    written: Callable[[str], Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    of = written("qwen3")
    monkeypatch.setattr(check, "this_machine", lambda: Machine("riscv64", frozenset()))
    assert sorted(path.name for path in of.write("arm64").iterdir() if path.name.startswith(".")) == []
    attention_scale(monkeypatch)
    assert "the first difference is in layers.1 attention (" in refusal(of, "arm64")


def test_the_prompt_passes_windows_where_the_size_allows_it(written: Callable[[str], Written]) -> None:
    of = written("mistral-sliding")
    checkpoint = of.checkpoint
    assert recording.prompt_length(checkpoint) == 300
    decoder = checkpoint.decoder
    try:
        checkpoint.decoder = replace(decoder, sliding_window=500)
        assert recording.prompt_length(checkpoint) == 532
        checkpoint.parameters = int(1e10)
        assert recording.prompt_length(checkpoint) == 300
    finally:
        checkpoint.decoder, checkpoint.parameters = decoder, checkpoint.model.num_parameters()


@pytest.mark.parametrize("name", ["llama", "olmo2"])  # norms read the stream, or linear layers
def test_each_part_reads_what_it_is_given(name: str, tmp_path: Path) -> None:
    checkpoint = load(locate(str(write_checkpoint(tmp_path / name, name))))
    prompt = np.arange(recording.LAST_TOKENS)
    own = recording.record(checkpoint, prompt)
    again = recording.record(checkpoint, prompt, own.streams)
    assert recording.local_errors(own, again.logits, again.streams) == dict.fromkeys([*own.streams, "head"], 0.0)
    # Another input of one part changes what this part adds, and nothing behind it.
    given = {**own.streams, "layers.0 attention": np.roll(own.streams["layers.0 attention"], 1, axis=0)}
    changed = recording.record(checkpoint, prompt, given)
    errors = recording.local_errors(own, changed.logits, changed.streams)
    assert errors.pop("layers.0 MLP") > 0.1
    assert max(errors.values()) < 1e-5


def test_values_that_are_not_finite_differ() -> None:
    logits = np.random.default_rng(0).standard_normal((4, 9)).astype(np.float32)
    expected = recording.Recording(np.arange(4), logits, {})
    assert recording.difference(expected, logits, {}, limit=1e-3) is None
    broken = logits.copy()
    broken[1, 2] = np.nan
    assert recording.difference(expected, broken, {}, limit=1e-3) is not None
