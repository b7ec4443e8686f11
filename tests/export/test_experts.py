"""A model with experts: its modules, its definition, its bundle, its calibration, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from family_exports import FamilyExport
from numpy.typing import NDArray
from said_tokens import assert_sessions_say_the_same
from tiny_models import EXPERTS, write_checkpoint
from transformers import AutoModelForCausalLM

from mbq_export.cli import command
from mbq_export.context import Calibration
from mbq_export.format.experts import choose_experts, experts_matmul
from mbq_export.format.nbits import pack_nbits, side_by_side
from mbq_export.format.ops import gated_gelu, gated_silu
from mbq_export.lower.builder import ExpertsStep
from mbq_export.lower.onnx_experts import ExpertNodes
from mbq_export.lower.onnx_graph import Graph
from mbq_export.methods import METHODS, Recipe
from mbq_export.model.checkpoint import Checkpoint
from mbq_export.model.loading import load
from mbq_export.model.source import locate
from mbq_export.slicing import rtn
from mbq_export.slicing.by_block import slice_model
from mbq_export.slicing.expert_inputs import FEWEST_TOKENS, ExpertInputs
from mbq_export.slicing.expert_windows import ENOUGH_TOKENS, choose, expert_tokens
from mbq_export.slicing.importance import alike
from mbq_export.store import Store
from mbq_runtime import BundleError, Engine, UsageError
from mbq_runtime.bundle import manifest as bundle_manifest
from mbq_runtime.bundle.parameters import check_parameters
from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_runtime.bundle.tensors import WEIGHTS, read_entries
from mbq_targets.spec import KernelSpec

RNG = np.random.default_rng(5)
TEXTS = RNG.integers(0, 256, (3, 200)).tolist()  # more than one pass of a prompt
SPEC = KernelSpec(SliceProfile.parse("3,1,2,2"), 64)

Array = NDArray[Any]


@pytest.fixture(scope="module", params=EXPERTS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def checkpoint(model: Path) -> Checkpoint:
    return load(locate(str(model)))


@pytest.fixture(scope="module")
def wanted(model: Path) -> Array:
    return transformers_logits(model)


def transformers_logits(model: Path) -> Array:
    """float32 [texts, tokens, vocab]."""
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        return np.asarray(original(torch.tensor(TEXTS)).logits.numpy())


def test_single_experts_are_the_model(checkpoint: Checkpoint, wanted: Array) -> None:
    with torch.no_grad():
        found = checkpoint.model(torch.tensor(TEXTS)).logits.numpy()
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_weights_from_a_file_are_the_same(model: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    mapped = dict(load(locate(str(model)), tmp_path).model.named_parameters())
    for name, weight in checkpoint.model.named_parameters():
        assert torch.equal(mapped[name], weight), name


def _chooser(checkpoint: Checkpoint, layer: int) -> tuple[Any, Any, Any]:
    weight, bias = checkpoint.chooser(layer)
    return weight, checkpoint.decoder.experts, bias


def test_the_definition_is_what_transformers_computes(checkpoint: Checkpoint) -> None:
    """To what rounding to 8 bits leaves."""
    d = checkpoint.decoder
    layer = next(layer for layer in range(d.layers) if "experts" in d.branches(layer))
    chooser = d.chooser(layer)
    assert chooser is not None
    assert d.experts is not None
    x = torch.randn(30, d.hidden_size, generator=torch.Generator().manual_seed(1)) * 2
    owner = checkpoint.model.get_submodule(chooser.rpartition(".")[0])
    with torch.no_grad():
        if d.readers(layer) == d.branches(layer):
            expected = owner(x[None])[0].numpy()
        else:  # both read the stream, each behind a norm
            block = checkpoint.model.get_submodule(d.block(layer))
            _, of_chosen, taken = owner(x)
            x = block.pre_feedforward_layernorm_2(x)
            expected = block.experts(x, taken, of_chosen).numpy()
    chosen, weights = choose_experts(x.numpy(), *_chooser(checkpoint, layer))
    matrices = []
    for unit in (d.layer_units(layer)["experts_in"], d.layer_units(layer)["experts_out"]):
        sliced = rtn.slice_unit(checkpoint, unit, 64, SPEC.profile)
        rows = len(sliced.codes) // d.experts.count
        matrices.append([sliced.rows(slice(at * rows, (at + 1) * rows)) for at in range(d.experts.count)])
    depth = np.full(30, 4, np.int32)
    gated = gated_silu if d.activation == "silu" else gated_gelu
    inner = gated(experts_matmul(x.numpy(), chosen, depth, matrices[0], SPEC))
    outputs = experts_matmul(inner.astype(np.float32), chosen, depth, matrices[1], SPEC)
    found = (outputs * weights[..., None]).sum(1)
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


def test_the_nodes_choose_as_the_definition_does(checkpoint: Checkpoint) -> None:
    d, graph = checkpoint.decoder, Graph()
    layer = d.layers - 1
    assert d.experts is not None
    chosen = ExpertNodes(graph, checkpoint).choose(ExpertsStep("experts", layer, d.experts, "silu"), "x")
    value = onnx.helper.make_tensor_value_info
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in graph.tensors.items()]
    outputs = [value(chosen.indices, onnx.TensorProto.INT64, None), value(chosen.weights, 1, None)]
    made = onnx.helper.make_graph(graph.nodes, "g", [value("x", 1, [1, "t", d.hidden_size])], outputs, constants)
    model = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 22)], ir_version=10)
    x = RNG.standard_normal((40, d.hidden_size)).astype(np.float32)
    indices, weights = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x[None]})
    expected, shares = choose_experts(x, *_chooser(checkpoint, layer))
    assert np.array_equal(indices[0], expected)
    # The sigmoid of ONNX Runtime is off by 2e-5.
    np.testing.assert_allclose(weights[0], shares, rtol=1e-4, atol=5e-5)


def test_matrices_side_by_side_add_up() -> None:
    """The product with the parts beside each other is the sum of the products with each part."""
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((3 * 16, 128)).astype(np.float32)
    whole = pack_nbits(rtn.slice_weight(weight, 64, SPEC.profile, "w"), SPEC.profile)
    beside = side_by_side(whole, 3)
    # Rows of several parts are summed, so they have one gain.
    assert np.array_equal(beside.pop("gain"), whole.pop("gain")[:, :16])
    for name, tensor in whole.items():
        parts = [tensor[at * 16 : (at + 1) * 16] for at in range(3)]
        assert np.array_equal(beside[name], np.concatenate(parts, axis=1)), name


def exported(model: Path, folder: Path, text: Path, *options: str) -> Path:
    arguments = ["--model", str(model), "--output", str(folder), "--calib-data", str(text), "--calib-tokens", "512"]
    command([*arguments, "--method", "rtn", "--kv", "32", "--json", *options], standalone_mode=False)
    return folder


@pytest.mark.heavy
@pytest.mark.parametrize("name", EXPERTS)
def test_a_session_goes_on_or_goes_back(name: str, families: Callable[[str], FamilyExport]) -> None:
    for engine in families(name).loaded():
        # A convolution keeps the last tokens alone, so a session with some begins again.
        assert_sessions_say_the_same(engine, TEXTS[0], 100 if engine._backend.rewinds else 0)


@pytest.mark.heavy
def test_what_chooses_experts_has_one_shape(families: Callable[[str], FamilyExport]) -> None:
    folder, name = families("qwen3_moe").host, "layers.1.chooser"
    manifest, entries = bundle_manifest.read(folder), read_entries(folder / WEIGHTS)
    check_parameters(folder, entries, manifest, None)
    wrong = entries | {name: replace(entries[name], shape=(7, manifest.model.hidden_size))}
    with pytest.raises(BundleError, match=rf"{name} has type F32 and shape \[7, 192\], needed F32 and \[8, 192\]"):
        check_parameters(folder, wrong, manifest, None)
    with pytest.raises(BundleError, match=rf"{name} has shape none, needed \[8, 192\]"):
        check_parameters(folder, {other: entries[other] for other in entries if other != name}, manifest, None)


@pytest.mark.heavy
def test_a_tuned_bundle(tmp_path: Path, calibration_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Error feedback on windows that are chosen for experts, tuning and routers of every kind."""
    monkeypatch.setitem(METHODS, "nested", replace(METHODS["nested"], hessian_windows=2))
    model = write_checkpoint(tmp_path / "model", "qwen3_moe")
    options = ["--target", "portable", "--method", "nested", "--tune-steps", "4", "--calib-tokens", "2048"]
    engine = Engine.load(exported(model, tmp_path / "bundle", calibration_text, *options))
    wanted = transformers_logits(model)
    found = np.stack([engine.logits(text, 8.0).logits for text in TEXTS])
    assert np.linalg.norm(found - wanted) < 0.3 * np.linalg.norm(wanted)
    assert 3 < engine.logits(TEXTS[0], 4.0).avg_bits_used < 6


def test_an_expert_that_few_tokens_choose_is_rounded(checkpoint: Checkpoint) -> None:
    """It has second moments without covariance; the others have those of their own inputs."""
    d = checkpoint.decoder
    layer = d.layers - 1
    gate, _, down = d.expert_layers(layer)
    windows = np.zeros((1, 64), np.int64)
    seen = ExpertInputs(checkpoint, layer, alike(checkpoint, windows), slice(None))
    x = torch.randn(64, d.hidden_size, generator=torch.Generator().manual_seed(1))
    experts = checkpoint.model.get_submodule(gate[0].rpartition(".")[0].rpartition(".")[0])
    chosen = torch.zeros(64, 1, dtype=torch.long)
    chosen[: FEWEST_TOKENS - 1] = 1
    with seen.watching(), torch.no_grad():
        experts(x, chosen, torch.ones(64, 1))
    found = seen.hessians(64)
    few = torch.eye(d.hidden_size)
    of_one = x[FEWEST_TOKENS - 1 :]
    assert torch.equal(found[gate[1]](), few)
    assert torch.allclose(found[gate[0]](), of_one.T @ of_one / 64, rtol=0.05, atol=0.05)
    assert found[down[0]]().shape == (d.experts.ffn_size,) * 2  # type: ignore[union-attr]
    assert seen.rare == d.experts.count - 1  # type: ignore[union-attr]


def test_windows_are_chosen_for_experts_that_see_little() -> None:
    counts = np.zeros((6, 4), np.int64)
    counts[:, 0] = ENOUGH_TOKENS
    counts[4, 1] = 40
    counts[2, 2] = 30
    assert choose(counts, 2).tolist() == [2, 4]
    assert choose(counts, 6).tolist() == [*range(6)]


def test_tokens_of_experts_are_counted(checkpoint: Checkpoint) -> None:
    d = checkpoint.decoder
    assert d.experts is not None
    windows = np.array(TEXTS)
    counts = expert_tokens(checkpoint, windows, lambda done, total: None)
    of_layers = counts.reshape(len(windows), -1, d.experts.count)
    assert (of_layers.sum(2) == windows.shape[1] * d.experts.used).all()
    last = [layer for layer in range(d.layers) if "experts" in d.branches(layer)][-1]
    chooser = checkpoint.model.get_submodule(str(d.chooser(last)))
    seen: list[Array] = []
    hook = chooser.register_forward_hook(lambda module, inputs, outputs: seen.append(inputs[0].numpy()))
    with hook, torch.no_grad():
        checkpoint.model(torch.from_numpy(windows))
    chosen, _ = choose_experts(seen[0].reshape(-1, d.hidden_size), *_chooser(checkpoint, last))
    expected = [np.bincount(part.reshape(-1), minlength=d.experts.count) for part in np.split(chosen, len(windows))]
    assert np.abs(of_layers[:, -1] - expected).max() <= 1  # two scores may be nearly the same


def test_rare_experts_are_said_in_one_line(
    tmp_path: Path, calibration_text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_checkpoint(tmp_path / "model", "qwen3_moe-sparse", num_experts=64, num_experts_per_tok=1)
    with caplog.at_level(logging.WARNING):
        exported(source, tmp_path / "bundle", calibration_text, "--target", "portable", "--method", "quick")
    (said,) = [record.getMessage() for record in caplog.records if "experts" in record.getMessage()]
    assert "tokens of the calibration text: each of their weights is rounded by itself" in said
    assert "\n" not in said


def test_rare_experts_are_counted_in_the_blocks_of_an_earlier_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_checkpoint(tmp_path / "model", "qwen3_moe", num_experts=64, num_experts_per_tok=1)
    windows, said, work = np.array(TEXTS), [], tmp_path / "work"
    for _ in range(2):
        checkpoint = load(locate(str(source)))
        recipe = Recipe(SPEC.profile, SPEC.group_size, method="quick")
        with caplog.at_level(logging.WARNING):
            slice_model(Calibration(checkpoint, recipe, Store(work, "inputs")), windows, alike(checkpoint, windows))
        said.append([record.getMessage() for record in caplog.records if "experts" in record.getMessage()])
        caplog.clear()
        d = checkpoint.decoder
        (work / f"{d.block(d.layers - 1)}.safetensors").unlink()
    assert len(said[0]) == 1
    assert said[1] == said[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "webgpu"), "target webgpu: .*experts.* have no GPU kernel; choose a processor's target"),
    ],
)
def test_other_engines_are_refused_before_any_work(
    model: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        command(["--model", str(model), "--output", str(tmp_path / "b"), "--dry-run", *options], standalone_mode=False)
    assert "\n" not in str(raised.value)
