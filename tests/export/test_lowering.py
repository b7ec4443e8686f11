"""A lowered decoder of every family returns the logits of transformers with the same decoded weights."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx.inliner import inline_local_functions
from tiny_models import MODELS, write_checkpoint

from mbq_export.calibrated import Calibrated, RoutedLinear
from mbq_export.format.codes import decode_f32
from mbq_export.format.router import RouterParams
from mbq_export.lower.onnx import lower
from mbq_export.model.checkpoint import Checkpoint
from mbq_export.model.loading import load
from mbq_export.model.shape import Unit
from mbq_export.model.source import locate
from mbq_export.slicing import rtn
from mbq_export.write import files
from mbq_runtime.bundle.onnx_file import read_graph
from mbq_runtime.bundle.shapes import Bounds, Value, infer
from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_runtime.engine.session import empty_past

PROFILE = SliceProfile.parse("3,1,2,2")
GROUP_SIZE = 64
# Longer than the windows of models that have them, shorter than the original context of those with longrope.
TOKENS = np.random.default_rng(7).integers(0, 256, 40).tolist()
# Two int8 terms of activations leave 2e-4 on these random models; a window off by one token leaves 0.2,
# attention scaled by 1.2 leaves 0.05.
TOLERANCE = 1e-3

Logits = NDArray[np.float32]


QUICK = ("gemma3_text", "lfm3", "llama", "phi3-longrope")
"""Families of the quick tier: the plain one; windows, norms behind branches and of heads; convolutions; a table of
rotations and packed matrices."""
FAMILIES = [pytest.param(name, marks=[pytest.mark.heavy] * (name not in QUICK)) for name in sorted(MODELS)]


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load(locate(str(write_checkpoint(tmp_path_factory.mktemp("models") / request.param, request.param))))


@pytest.fixture(scope="module")
def original_logits(checkpoint: Checkpoint) -> Logits:
    return _torch_logits(checkpoint.model)


@pytest.fixture(scope="module")
def rescaled(checkpoint: Checkpoint, original_logits: Logits) -> tuple[Checkpoint, NDArray[np.float32]]:
    """The checkpoint with channels scaled as calibration scales them, but by random factors.

    Returns also the factors of the head's columns.
    """
    generator = torch.Generator().manual_seed(3)
    d = checkpoint.decoder

    def factors(width: int) -> torch.Tensor:
        return torch.exp(torch.rand(width, generator=generator) - 0.5)

    def move(layer: int, before: str, after: str, rows: torch.Tensor, columns: torch.Tensor) -> None:
        for tensor in checkpoint.part(layer, before):
            if tensor is not None:
                tensor.div_(rows[:, None] if tensor.ndim == 2 else rows)
        checkpoint.part(layer, after)[0].mul_(columns)

    for layer in range(d.layers):
        for role, (norm, _) in d.normed_units(layer).items():
            factor = factors(d.hidden_size)
            checkpoint.scale_norm(norm, 1 / factor)
            for part in d.parts(layer).get(role, ()):
                checkpoint.part(layer, part)[0].mul_(factor)
            if role == "experts_in":
                for name in d.norm_readers(layer)[norm]:
                    checkpoint.model.get_submodule(name).weight.mul_(factor)
        if d.family.value_norms:
            pass  # a norm stands between v and o
        elif d.mixer(layer) == "attn":
            factor = factors(d.kv_heads * d.head_dim)
            by_query = factor.reshape(d.kv_heads, 1, -1).expand(-1, d.heads // d.kv_heads, -1).reshape(-1)
            move(layer, "v", "o", factor, by_query)
        elif d.delta is not None:
            factor = factors(d.delta.value_dim)
            checkpoint.scale_delta_norm(layer, 1 / factor)
            checkpoint.part(layer, "out")[0].mul_(factor.repeat(d.delta.value_heads))
        else:
            factor = factors(d.hidden_size)
            move(layer, "c", "y", factor, factor)
        if "mlp" in d.branches(layer):
            factor = factors(d.ffn_size_of(layer))
            move(layer, "up", "down", factor, factor)
    factor = factors(d.hidden_size)
    checkpoint.scale_norm(d.final_norm, 1 / factor)
    head = checkpoint.linear(d.head.sources[0])
    head.weight = torch.nn.Parameter(head.weight * factor, requires_grad=False)
    return checkpoint, factor.numpy()


@pytest.fixture(scope="module")
def calibrated(rescaled: tuple[Checkpoint, NDArray[np.float32]]) -> Calibrated:
    """Every matrix rounded to nearest.  The router gives tokens with larger activations more bits."""
    checkpoint, head_scale = rescaled
    budgets = np.arange(3, 9, dtype=np.float32)
    steps = np.arange(PROFILE.depths - 1, dtype=np.float32)
    router = RouterParams(2 - 0.5 * steps, np.full_like(steps, 0.5), budgets, np.linspace(3, -3, 6).astype(np.float32))

    def routed(unit: Unit) -> RoutedLinear:
        sliced = rtn.slice_unit(checkpoint, unit, GROUP_SIZE, PROFILE)
        return RoutedLinear(unit, sliced, checkpoint.bias(unit), router)

    units = {unit.name: routed(unit) for unit in checkpoint.decoder.units()}
    own_table = None
    if not checkpoint.decoder.tied:
        own_table = rtn.slice_weight(checkpoint.embedding(), GROUP_SIZE, PROFILE, "embedding")
    per_layer = None
    if checkpoint.decoder.per_layer_size:
        per_layer = rtn.slice_weight(checkpoint.per_layer_table(), GROUP_SIZE, PROFILE, "per_layer")
    return Calibrated(PROFILE, GROUP_SIZE, "norm", units, own_table, head_scale, per_layer=per_layer)


@pytest.fixture(scope="module")
def session(
    checkpoint: Checkpoint, calibrated: Calibrated, tmp_path_factory: pytest.TempPathFactory
) -> ort.InferenceSession:
    """The portable graph.  It also returns the depth of each token in each unit."""
    folder = tmp_path_factory.mktemp("graph")
    model, tensors, _ = lower(checkpoint, calibrated, "nbits")
    for name in calibrated.units:
        model.graph.output.append(onnx.helper.make_tensor_value_info(f"{name}.depth", onnx.TensorProto.INT32, None))
    files.write_model(model, tensors, folder)
    return ort.InferenceSession(str(folder / "model.onnx"))


def _torch_logits(model: torch.nn.Module) -> Logits:
    with torch.no_grad():
        return np.asarray(model(torch.tensor([TOKENS])).logits[0].numpy())


def _made(name: str) -> str:
    """The output that becomes this input in the next pass."""
    return name.replace("past_key_values", "present").replace("past.", "present.")


def _run(
    session: ort.InferenceSession, tokens: list[int], bits: float, past: dict[str, NDArray[np.float32]] | None = None
) -> dict[str, NDArray[np.float32]]:
    """Run one pass.  past: outputs of the pass before it, None for the first.  Returns outputs by name."""
    caches = {i.name: i.shape for i in session.get_inputs() if i.name.startswith("past")}
    feed: dict[str, NDArray[np.generic]] = {
        name: empty_past(shape) if past is None else past[_made(name)] for name, shape in caches.items()
    }
    seen = next((array.shape[2] for name, array in feed.items() if name.endswith(".key")), 0)
    feed["input_ids"] = np.array([tokens], np.int64)
    feed["attention_mask"] = np.ones((1, seen + len(tokens)), np.int64)
    feed["avg_bits"] = np.array([bits, 8], np.float32)
    feed["scored"] = np.array([len(tokens)], np.int64)
    outputs = [o.name for o in session.get_outputs()]
    return dict(zip(outputs, session.run(outputs, feed), strict=True))


def _relative_rms(a: Logits, b: Logits) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_parts_and_norms_are_where_the_decoder_says(
    rescaled: tuple[Checkpoint, NDArray[np.float32]], original_logits: Logits
) -> None:
    """Scaling channels changes nothing.  It would, if the decoder named a wrong norm or wrong rows."""
    np.testing.assert_allclose(_torch_logits(rescaled[0].model), original_logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("bits", "depth"), [(3.0, 1), (8.0, PROFILE.depths)])
def test_logits_are_those_of_decoded_weights(
    checkpoint: Checkpoint, calibrated: Calibrated, session: ort.InferenceSession, bits: float, depth: int
) -> None:
    out = _run(session, TOKENS, bits)
    model = copy.deepcopy(checkpoint.model)
    table = calibrated.embedding or calibrated.units["head"].sliced
    rows = torch.from_numpy(decode_f32(table, PROFILE, PROFILE.depths))
    if calibrated.embedding is None:
        rows /= torch.from_numpy(calibrated.head_scale)
    model.get_input_embeddings().weight.copy_(rows)
    if calibrated.per_layer is not None:
        rows = torch.from_numpy(decode_f32(calibrated.per_layer, PROFILE, PROFILE.depths))
        model.model.embed_tokens_per_layer.weight.copy_(rows)
    for linear in calibrated.units.values():
        weights = torch.from_numpy(decode_f32(linear.sliced, PROFILE, depth))
        layers = [model.get_submodule(name) for name in linear.unit.sources]
        for layer, weight in zip(layers, weights.split([layer.out_features for layer in layers]), strict=True):
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    assert _relative_rms(out["all_logits"][0], _torch_logits(model)) < TOLERANCE
    np.testing.assert_allclose(out["logits"][0, 0], out["all_logits"][0, -1], rtol=1e-5, atol=1e-5)
    assert out["avg_bits_used"] == pytest.approx(bits)


def test_steps_with_a_cache_equal_one_pass(session: ort.InferenceSession) -> None:
    whole = _run(session, TOKENS, 8.0)["all_logits"][0]
    past = _run(session, TOKENS[:30], 8.0)
    for i in range(30, len(TOKENS)):
        past = _run(session, TOKENS[i : i + 1], 8.0, past)
        np.testing.assert_allclose(past["logits"][0, 0], whole[i], atol=TOLERANCE * np.abs(whole).max())


def test_bits_used_is_the_parameter_weighted_average(calibrated: Calibrated, session: ort.InferenceSession) -> None:
    sizes = {name: linear.parameters for name, linear in calibrated.units.items()}
    seen = []
    for bits in (3.0, 4.0, 5.5, 7.0, 8.0):
        out = _run(session, TOKENS, bits)
        by_unit = {name: np.take(PROFILE.depth_bits, out[f"{name}.depth"] - 1).mean() for name in sizes}
        expected = sum(by_unit[name] * size for name, size in sizes.items()) / sum(sizes.values())
        assert out["avg_bits_used"] == pytest.approx(expected, rel=1e-5)
        seen.append(float(expected))
    assert seen == sorted(seen)
    assert seen[0] == 3.0
    assert seen[-1] == 8.0
    assert any(3.0 < bits < 8.0 for bits in seen)


def test_a_board_infers_the_shapes_that_the_engine_makes(
    checkpoint: Checkpoint, calibrated: Calibrated, tmp_path: Path
) -> None:
    """Every value of the graph and of the functions, with tokens at the largest depth."""
    model, tensors, _ = lower(checkpoint, calibrated, "nbits")
    files.write_model(model, tensors, tmp_path)
    model = inline_local_functions(onnx.load(tmp_path / "model.onnx", load_external_data=False))
    names = {name for node in model.graph.node for name in node.output if name}
    for name in sorted(names - {output.name for output in model.graph.output}):
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    onnx.save(model, tmp_path / "model.onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), options)
    past = {
        o.name: np.zeros([1, *(side if isinstance(side, int) else 4 for side in o.shape[1:])], np.float32)
        for o in session.get_outputs()
        if o.name.startswith("present")
    }
    made = _run(session, TOKENS[:5], 8.0, past)
    graph = read_graph(tmp_path / "model.onnx")
    given = {tensor.name: Value(tensor.shape, tensor.numbers) for tensor in graph.initializers}
    given |= {"input_ids": Value((1, 5)), "attention_mask": Value((1, 9)), "avg_bits": Value((2,))}
    given |= {"scored": Value((1,), (5,))}
    for name in (i.name for i in session.get_inputs() if i.name.startswith("past")):
        given[name] = Value(made[_made(name)].shape)
    found = infer(graph.nodes, graph.functions, given, Bounds(10**9, 10**12))
    assert names <= found.keys()
    assert {name: found[name].shape for name in made} == {name: value.shape for name, value in made.items()}
    for name, value in made.items():
        numbers = found[name].numbers
        assert numbers is None or numbers == tuple(value.reshape(-1).tolist())
