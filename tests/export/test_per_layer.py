"""Gemma 4: per-layer embeddings, keys and values that blocks share, heads of two sizes, scalars of layers."""

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
from safetensors.torch import load_file, save_file
from said_tokens import assert_sessions_say_the_same, assert_steps_are_one_pass
from tiny_models import COMMON, MODELS, tokenizer, write_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from mbq_export.cli import command
from mbq_export.format import ops
from mbq_export.format.per_layer import per_layer
from mbq_export.model import gradients
from mbq_export.model.blocks import Blocks
from mbq_export.model.checkpoint import Checkpoint
from mbq_export.model.gradients import backpropagate_samples
from mbq_export.model.loading import left_out, load
from mbq_export.model.per_layer import NORM, given
from mbq_export.model.source import locate
from mbq_export.slicing import rtn
from mbq_export.transforms.smoothing import smooth
from mbq_runtime import BundleError, Engine, UsageError
from mbq_runtime.bundle.genai_config import cache_bytes, read_settings
from mbq_runtime.bundle.slice_profile import SliceProfile

RNG = np.random.default_rng(5)
TEXTS = RNG.integers(0, 256, (3, 200)).tolist()  # more than one pass of a prompt
# Rounding to 8 bits leaves this much of the logits of these random weights.
ROUNDED = 0.1
NAME = "gemma4_text"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "gemma4", NAME)


@pytest.fixture
def checkpoint(model: Path) -> Checkpoint:
    return load(locate(str(model)))


@pytest.fixture(scope="module")
def original(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def close(found: Any, wanted: Any, limit: float) -> bool:
    return bool(np.linalg.norm(np.asarray(found) - np.asarray(wanted)) < limit * np.linalg.norm(np.asarray(wanted)))


def test_what_the_embedding_gives_a_block_is_what_transformers_gives_it(checkpoint: Checkpoint, original: Any) -> None:
    tokens = torch.tensor(TEXTS[:1])
    with torch.no_grad():
        inner = original.model
        wanted = inner.project_per_layer_inputs(inner.embed_tokens(tokens), inner.get_per_layer_inputs(tokens))
        for layer in range(4):
            assert close(given(checkpoint.model, layer, tokens), wanted[:, :, layer], 1e-6)


def test_the_definition_is_what_transformers_computes(checkpoint: Checkpoint) -> None:
    """What a block adds, with the norm behind its projection."""
    d, block, tokens = checkpoint.decoder, checkpoint.model.model.layers[1], torch.tensor(TEXTS[:1])
    stream = torch.randn(1, 200, d.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = block.act_fn(block.per_layer_input_gate(stream)) * given(checkpoint.model, 1, tokens)
        gate = block.per_layer_input_gate(stream)[0].numpy()
        from_embedding = block.per_layer_model_projection(checkpoint.model.model.embed_tokens(tokens))[0].numpy()
    size = d.per_layer_size
    rows = checkpoint.per_layer_table()[tokens[0]][:, size : 2 * size] * np.float32(d.per_layer_scale)
    found = per_layer(gate, from_embedding, rows, checkpoint.norm(NORM), eps=d.norm_eps, gated=ops.gated_gelu)
    assert close(found, wanted[0], 1e-6)


def test_block_by_block_is_the_whole_model(checkpoint: Checkpoint, original: Any) -> None:
    """Each window has its own row of the table, and its own keys and values for the blocks that share them."""
    windows = np.array(TEXTS)[:2]
    blocks = Blocks(checkpoint, windows.shape[1])
    hidden = blocks.embed(windows)
    for layer in range(checkpoint.decoder.layers):
        for _ in range(2):  # a block may run again, as while it is sliced
            after = [blocks.run(layer, window) for window in hidden]
        hidden = after
    with torch.no_grad():
        wanted = original.model(torch.from_numpy(windows)).last_hidden_state
    for window, expected in zip(hidden, wanted, strict=True):
        assert close(blocks.final(window), expected, 1e-5)


def test_gradients_reach_every_linear_layer(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the same where a block is computed again in the backward pass, which also writes what it shares."""
    seen: dict[str, float] = {}

    def watch(name: str) -> Any:
        def forward(_: Any, args: Any, output: torch.Tensor) -> None:
            output.register_hook(lambda gradient: seen.update({name: float(gradient.abs().sum())}))

        return forward

    names = [name for unit in checkpoint.decoder.units() for name in unit.sources]
    for name in names:
        checkpoint.linear(name).register_forward_hook(watch(name))
    backpropagate_samples(checkpoint, np.array(TEXTS[0][:40]), torch.Generator().manual_seed(0))
    assert seen.keys() == set(names)
    assert all(total > 0 for total in seen.values())
    kept, seen = seen, {}
    monkeypatch.setattr(gradients, "KEPT_ACTIVATION_BYTES", 0)
    with gradients.lean_backward(checkpoint):
        backpropagate_samples(checkpoint, np.array(TEXTS[0][:40]), torch.Generator().manual_seed(0))
    assert seen == pytest.approx(kept, rel=1e-4)


def test_smoothing_changes_weights_and_no_logits(checkpoint: Checkpoint, original: Any) -> None:
    """Values go through a norm, so v and o stay as they are; gate, up and down of the MLP do not."""
    before = {part: checkpoint.part(0, part)[0].clone() for part in ("o", "down", "q")}
    smooth(checkpoint, np.array(TEXTS)[:, :64])
    with torch.no_grad():
        tokens = torch.tensor(TEXTS)
        assert close(checkpoint.model(tokens).logits, original(tokens).logits, 1e-5)
    same = {part: torch.equal(checkpoint.part(0, part)[0], weight) for part, weight in before.items()}
    assert same == {"o": True, "down": False, "q": False}


def test_a_table_is_rounded_in_parts() -> None:
    table = RNG.standard_normal((9, 1 << 19)).astype(np.float32)
    profile = SliceProfile.parse("3,1,2,2")
    # The table has more weights than are rounded at once.
    found, wanted = (one(table, 64, profile, "table") for one in (rtn.slice_table, rtn.slice_weight))
    for name in ("codes", "scale_codes", "zero_codes", "row_scale"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))


def test_keys_and_values_without_their_own_are_read_from_the_cache() -> None:
    """What the graph asks of ONNX Runtime's attention: queries alone, and a cache that is as long as all tokens."""
    q, k, v = RNG.standard_normal((3, 1, 5, 64)).astype(np.float32)
    cache = [x.reshape(1, 5, 2, 32).transpose(0, 2, 1, 3) for x in (k, v)]
    none = np.empty((1, 0, 64), np.float32)
    lengths = {"seqlens_k": np.array([4], np.int32), "total": np.array(5, np.int32)}
    feeds = {"q": q[:, 2:], "none": none, "keys": cache[0], "values": cache[1], **lengths}
    inputs = ["q", "none", "none", "keys", "values", *lengths]
    kinds = {np.dtype(np.float32): 1, np.dtype(np.int32): 6}
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node(
        "GroupQueryAttention", inputs, ["out"], domain="com.microsoft", num_heads=2, kv_num_heads=2, scale=0.5,
        local_window_size=3,
    )  # fmt: skip
    given_values = [value(name, kinds[array.dtype], array.shape) for name, array in feeds.items()]
    graph = onnx.helper.make_graph([node], "shared", given_values, [value("out", 1, None)])
    opsets = [onnx.helper.make_opsetid("", 22), onnx.helper.make_opsetid("com.microsoft", 1)]
    session = ort.InferenceSession(
        onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    )
    (found,) = session.run(None, feeds)
    heads = q.reshape(5, 2, 32).transpose(1, 0, 2)[:, 2:]
    scores = heads @ cache[0][0].transpose(0, 2, 1) * 0.5
    ahead = np.arange(5)[None] - np.arange(2, 5)[:, None]
    scores[:, (ahead > 0) | (ahead <= -3)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    wanted = (weights @ cache[1][0]).transpose(1, 0, 2).reshape(1, 3, 64)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def bundle(families: Callable[[str], FamilyExport]) -> Path:
    return families(NAME).host


@pytest.fixture(scope="module")
def portable(families: Callable[[str], FamilyExport]) -> Path:
    return families(NAME).portable


@pytest.fixture(scope="module", params=[("bundle", "onnx"), ("bundle", "tvm"), ("portable", "onnx")], ids="-".join)
def engine(request: pytest.FixtureRequest) -> Engine:
    folder, kind = request.param
    return Engine.load(request.getfixturevalue(folder), engine=kind)


@pytest.fixture(scope="module")
def wanted(original: Any) -> NDArray[np.float32]:
    """Logits of transformers, float32 [texts, tokens, vocab]."""
    with torch.no_grad():
        return np.asarray(original(torch.tensor(TEXTS)).logits.numpy())


@pytest.mark.heavy
def test_the_bundle_says_what_transformers_says(engine: Engine, wanted: NDArray[np.float32]) -> None:
    found = np.stack([engine.logits(text, 8.0).logits for text in TEXTS])
    assert close(found, wanted, ROUNDED)
    at_4_bits = engine.logits(TEXTS[0], 4.0)
    assert not close(at_4_bits.logits, wanted[0], ROUNDED)
    assert 3 < at_4_bits.avg_bits_used < 6


@pytest.mark.heavy
def test_token_by_token_is_one_pass(engine: Engine) -> None:
    assert_steps_are_one_pass(engine, TEXTS)


@pytest.mark.heavy
def test_a_session_goes_on_and_goes_back(engine: Engine) -> None:
    assert_sessions_say_the_same(engine, TEXTS[0], 100)


@pytest.mark.heavy
def test_a_session_in_a_file(bundle: Path, tmp_path: Path) -> None:
    engine = Engine.load(bundle, engine="tvm")
    session = engine.session()
    engine.generate(TEXTS[0], max_tokens=6, avg_bits=8, session=session).text()
    engine.save_session(session, tmp_path / "kept")
    again = engine.load_session(tmp_path / "kept")
    prompt = [*TEXTS[0], 7]
    reply = engine.generate(prompt, max_tokens=6, avg_bits=8, session=again)
    assert reply.text() == engine.generate(prompt, max_tokens=6, avg_bits=8).text()
    assert reply.stats.cached_tokens == len(TEXTS[0])


@pytest.mark.heavy
@pytest.mark.parametrize(("kind", "weights"), [("onnx", "model.onnx.data"), ("tvm", "decoder.safetensors")])
def test_weights_are_mapped_and_not_read_when_an_engine_loads(
    bundle: Path, tmp_path: Path, kind: str, weights: str
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    engine = Engine.load(folder, engine=kind)
    sizes = {"Size": 0, "Rss": 0}  # kB
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first:
            here = line.endswith(f"{folder}/{weights}")
        elif here and first.rstrip(":") in sizes:
            sizes[first.rstrip(":")] += int(rest[0])
    assert engine.manifest.model.family == NAME
    assert sizes["Size"] * 1024 > 0.9 * (folder / weights).stat().st_size
    assert sizes["Rss"] < 0.1 * sizes["Size"]


@pytest.mark.heavy
def test_blocks_that_share_take_no_memory(bundle: Path) -> None:
    manifest = Engine.load(bundle).manifest
    assert cache_bytes(manifest, read_settings(bundle, manifest)) == 2 * 4 * 2 * (32 + 64)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("model.attention", ...), ("model.attention.2.source", 2), ("model.attention.2.source", 1),
        ("model.attention.0.source", 2), ("model.attention.3.source", -1), ("model.attention.1.head_dim", 32),
        ("model.attention.0.kv_heads", 1), ("model.attention.0.kv_heads", 0),
        ("model.attention", [{"source": 0, "kv_heads": 2, "head_dim": 32}]),
    ],
)  # fmt: skip
def test_other_heads_are_refused(portable: Path, tmp_path: Path, where: str, value: object) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(portable, folder)
    set_in(folder / "manifest.json", where, value)
    with pytest.raises(BundleError, match=r"model\.attention|attn_(in|out)|past_key") as raised:
        Engine.load(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.heavy
def test_a_bundle_whose_blocks_are_alike_has_no_such_key(families: Callable[[str], FamilyExport]) -> None:
    folder = families("llama").portable
    assert "attention" not in json.loads((folder / "manifest.json").read_text())["model"]


def test_a_gpu_is_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    options = ["--model", model, "--output", tmp_path / "bundle", "--target", "webgpu", "--dry-run"]
    with pytest.raises(UsageError, match=r"target webgpu: per-layer embeddings, .*have no GPU kernel") as raised:
        command([str(option) for option in options], standalone_mode=False)
    assert "\n" not in str(raised.value)


def test_the_text_part_of_a_wrapper(tmp_path: Path) -> None:
    """As it is published: with keys and values of the blocks that share others, which transformers leaves out too."""
    torch.manual_seed(0)
    blocks = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 32}
    vision = {**blocks, "intermediate_size": 64, "head_dim": 16, "patch_size": 4, "position_embedding_size": 64}
    text = {**COMMON, **MODELS[NAME]}
    config = AutoConfig.for_model("gemma4", text_config=text, vision_config=vision, audio_config=None)
    whole = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    folder = tmp_path / "gemma4"
    whole.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for part in ("k_proj", "v_proj", "k_norm"):
        own = weights[f"model.language_model.layers.0.self_attn.{part}.weight"]
        weights[f"model.language_model.layers.2.self_attn.{part}.weight"] = own.clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    source, tokens = locate(str(folder)), torch.tensor(TEXTS[:1])
    assert "vision" in left_out(source)
    with torch.no_grad():
        assert close(load(source).model(tokens).logits, whole(input_ids=tokens).logits, 1e-5)


def test_weights_in_a_file_keep_the_scalars(model: Path, original: Any, tmp_path: Path) -> None:
    checkpoint, tokens = load(locate(str(model)), weights_folder=tmp_path), torch.tensor(TEXTS[:1])
    with torch.no_grad():
        assert close(checkpoint.model(tokens).logits, original(tokens).logits, 1e-5)
