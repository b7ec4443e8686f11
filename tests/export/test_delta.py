"""A model with gated delta nets: its definition, its states from pass to pass, in sessions, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from family_exports import FamilyExport
from json_fields import set_in
from numpy.typing import NDArray
from said_tokens import assert_sessions_say_the_same, assert_steps_are_one_pass
from tiny_models import write_checkpoint
from transformers import AutoModelForCausalLM, PreTrainedConfig

from mbq_export.cli import command
from mbq_export.format.delta import delta_net
from mbq_export.lower.builder import Delta
from mbq_export.lower.onnx_delta import delta_nodes
from mbq_export.lower.onnx_graph import Graph
from mbq_export.model.checkpoint import Checkpoint
from mbq_export.model.loading import load, read_config
from mbq_export.model.source import locate
from mbq_runtime import BundleError, Engine, UsageError
from mbq_runtime.bundle import manifest as bundle_manifest
from mbq_runtime.bundle.genai_config import cache_bytes, read_settings, state_bytes
from mbq_runtime.errors import ModelError

RNG = np.random.default_rng(5)
TEXTS = RNG.integers(0, 256, (3, 200)).tolist()  # more than one pass of a prompt
# Rounding to 8 bits leaves 0.10 of the logits of these random weights (docs/log.md).
ROUNDED = 0.13

F64 = NDArray[np.float64]


@pytest.fixture(scope="module", params=[{}, {"linear_num_key_heads": 2, "linear_num_value_heads": 2}])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The second one has heads that ONNX Runtime multiplies by its matrix products: 64 x 64."""
    wide = {"linear_key_head_dim": 64, "linear_value_head_dim": 64} if request.param else {}
    folder = tmp_path_factory.mktemp("models") / "qwen3_5"
    return load(locate(str(write_checkpoint(folder, "qwen3_5_text", **request.param, **wide))))


def defined(checkpoint: Checkpoint, stacked: NDArray[Any], states: Any = None) -> tuple[F64, dict[str, F64]]:
    """Layer 0 by the definition."""
    d, weights = checkpoint.decoder, checkpoint.delta_weights(0)
    assert d.delta is not None
    return delta_net(stacked, d.delta, vars(weights), states, d.norm_eps)


def stacked_input(checkpoint: Checkpoint, x: torch.Tensor) -> NDArray[np.float32]:
    unit = checkpoint.decoder.layer_units(0)["delta_in"]
    weight = torch.cat([layer.weight for layer, _ in checkpoint.layers(unit)]).detach()
    return np.asarray(x.numpy() @ weight.numpy().T)


def test_the_definition_is_what_transformers_computes(checkpoint: Checkpoint) -> None:
    """In one pass of several chunks, and in two passes."""
    x = torch.randn(150, checkpoint.decoder.hidden_size, generator=torch.Generator().manual_seed(1)) * 2
    module = checkpoint.model.get_submodule(checkpoint.decoder.delta_net(0))
    with torch.no_grad():
        wanted = module(x[None])[0].numpy()
    stacked, out = stacked_input(checkpoint, x), checkpoint.part(0, "out")[0].detach().numpy().T
    whole, after = defined(checkpoint, stacked)
    first, between = defined(checkpoint, stacked[:70])
    rest, end = defined(checkpoint, stacked[70:], between)
    assert np.abs(whole @ out - wanted).max() < 1e-5 * np.abs(wanted).max()
    np.testing.assert_allclose(np.concatenate([first, rest]), whole, rtol=1e-9, atol=1e-12)
    for name, state in after.items():
        np.testing.assert_allclose(end[name], state, rtol=1e-9, atol=1e-12)


def test_the_nodes_are_the_definition(checkpoint: Checkpoint) -> None:
    """Many tokens, then one, then few, with the states carried; and the state of the run before in the same memory."""
    d = checkpoint.decoder
    assert d.delta is not None
    x = torch.randn(40, d.hidden_size, generator=torch.Generator().manual_seed(2)) * 2
    stacked, graph = stacked_input(checkpoint, x), Graph()
    result = delta_nodes(graph, checkpoint, Delta("net", 0, d.delta), "stacked")
    value, states = onnx.helper.make_tensor_value_info, d.delta.states
    inputs = [value("stacked", 1, [1, "tokens", stacked.shape[1]])]
    inputs += [value(f"past.0.{name}", 1, [1, *shape]) for name, shape in states.items()]
    outputs = [value(name, 1, None) for name in (result, *(f"present.0.{name}" for name in states))]
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in graph.tensors.items()]
    made = onnx.helper.make_graph(graph.nodes, "net", inputs, outputs, constants)
    opsets = [onnx.helper.make_opsetid("", 22), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(made, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString())
    kept = [np.zeros((1, *shape), np.float32) for shape in states.values()]
    found, before = [], None
    for part in np.split(stacked, [25, 26, 27]):
        feed = dict(zip([f"past.0.{name}" for name in states], kept, strict=True))
        out, *kept = session.run(None, {"stacked": part[None], **feed})
        expected, before = defined(checkpoint, part, before)
        assert np.abs(out[0] - expected).max() < 1e-4 * np.abs(expected).max()
        for state, wanted in zip(kept, before.values(), strict=True):
            assert np.abs(state[0] - wanted).max() < 1e-5 * np.abs(wanted).max()
        found.append(out[0])
    whole, _ = defined(checkpoint, stacked)
    assert np.abs(np.concatenate(found) - whole).max() < 1e-4 * np.abs(whole).max()


@pytest.fixture(scope="module")
def model(families: Callable[[str], FamilyExport]) -> Path:
    return families("qwen3_5_text").model


@pytest.fixture(scope="module")
def bundle(families: Callable[[str], FamilyExport]) -> Path:
    return families("qwen3_5_text").host


@pytest.fixture(scope="module")
def portable(families: Callable[[str], FamilyExport]) -> Path:
    return families("qwen3_5_text").portable


@pytest.fixture(scope="module")
def wanted(model: Path) -> NDArray[np.float32]:
    """Logits of transformers, float32 [texts, tokens, vocab]."""
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        return np.asarray(original(torch.tensor(TEXTS)).logits.numpy())


@pytest.fixture(scope="module", params=[("bundle", "onnx"), ("bundle", "tvm"), ("portable", "onnx")], ids="-".join)
def engine(request: pytest.FixtureRequest) -> Engine:
    folder, kind = request.param
    return Engine.load(request.getfixturevalue(folder), engine=kind)


@pytest.mark.heavy
def test_the_bundle_says_what_transformers_says(engine: Engine, wanted: NDArray[np.float32]) -> None:
    found = np.stack([engine.logits(text, 8.0).logits for text in TEXTS])
    assert np.linalg.norm(found - wanted) < ROUNDED * np.linalg.norm(wanted)


@pytest.mark.heavy
def test_token_by_token_is_one_pass(engine: Engine) -> None:
    assert_steps_are_one_pass(engine, TEXTS)


@pytest.mark.heavy
def test_a_session_goes_on_or_begins_again(engine: Engine) -> None:
    assert_sessions_say_the_same(engine, TEXTS[0], 0)  # a memory cannot go back to the 100th token


@pytest.mark.heavy
def test_a_session_goes_back_to_one_place(engine: Engine) -> None:
    """As in a chat whose template leaves the thoughts of earlier replies out: 16 tokens before the end of a prompt."""
    session, talk = engine.session(), TEXTS[1]
    prompts = [talk, [*talk[:195], 1, 2, 3, 4, 5, 6, 7], [*talk[:190], 9, 8, 7]]
    for prompt, kept in zip(prompts, (0, 184, 186), strict=True):
        reply = engine.generate(prompt, max_tokens=6, avg_bits=8, session=session)
        assert reply.text() == engine.generate(prompt, max_tokens=6, avg_bits=8).text()
        assert reply.stats.cached_tokens == kept


@pytest.mark.heavy
def test_what_cannot_be_taken_back_is_said(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="states of this model cannot be taken back"):
        engine.speculate = "on"
    with pytest.raises(UsageError, match="states of this model are not written to a file"):
        engine.save_session(engine.session(), tmp_path / "kept")


@pytest.mark.heavy
def test_the_memory_of_a_context(engine: Engine) -> None:
    settings = read_settings(engine.path, engine.manifest)
    assert cache_bytes(engine.manifest, settings) == 2 * 4 * 1 * 2 * 64
    assert state_bytes(engine.manifest, settings) == 2 * 4 * (288 * 3 + 6 * 16 * 32)
    session = engine.session()
    assert session.kept_bytes == 0
    engine.generate([1, 2, 3], max_tokens=1, session=session).text()
    room = session.kept_bytes - 2 * state_bytes(engine.manifest, settings)  # those of now, and a copy
    assert room > 0
    assert room % cache_bytes(engine.manifest, settings) == 0


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("model.states.recurrent", [6, 32, 16]), ("model.states.conv", [288, 4]), ("model.states.recurrent", [6, 512]),
        ("model.states", {"conv": [288, 3]}), ("model.states", ...), ("model.states.conv", [0, 3]),
    ],
)  # fmt: skip
def test_other_states_are_refused(portable: Path, tmp_path: Path, where: str, value: object) -> None:
    bundle = shutil.copytree(portable, tmp_path / "bundle")
    set_in(bundle / "manifest.json", where, value)
    with pytest.raises(BundleError, match=r"states|past\.0\.|delta_(in|out)") as raised:
        Engine.load(bundle)
    assert "\n" not in str(raised.value)


@pytest.mark.heavy
def test_a_bundle_without_states_has_no_such_key(families: Callable[[str], FamilyExport]) -> None:
    folder = families("llama").portable
    assert "states" not in json.loads((folder / "manifest.json").read_text())["model"]
    assert bundle_manifest.read(folder).model.states == {}


def test_a_gpu_is_refused_before_any_work(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "qwen3_5", "qwen3_5_text")
    options = ["--model", model, "--output", tmp_path / "bundle", "--target", "webgpu", "--dry-run"]
    with pytest.raises(UsageError, match=r"target webgpu: delta nets, .*have no GPU kernel") as raised:
        command([str(option) for option in options], standalone_mode=False)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration"), ("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM"),
        ("qwen3_next", "Qwen3NextForCausalLM"),
    ],
)  # fmt: skip
def test_experts_are_refused_by_the_config_alone(
    model_type: str, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"model_type": model_type, "architectures": [architecture]}
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", lambda name: (values, {}))
    with pytest.raises(ModelError, match=f"architecture {architecture} is not supported; supported: Llama") as raised:
        read_config(locate("somebody/model"))
    assert "\n" not in str(raised.value)
