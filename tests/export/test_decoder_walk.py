"""The walk calls a builder once for each step of the model, in the model's order, and passes values on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tiny_models import COMMON, MODELS
from transformers import AutoConfig

from mbq_export.calibrate import Calibrated, RoutedLinear
from mbq_export.format.codes import Sliced
from mbq_export.format.router import RouterParams
from mbq_export.lower.builder import (
    Attention,
    Builder,
    Convolution,
    Delta,
    Embedding,
    ExpertsStep,
    Gate,
    Norm,
    PerLayer,
)
from mbq_export.lower.decoder import walk_blocks, walk_head
from mbq_export.model.describe import describe
from mbq_export.model.shape import Decoder
from mbq_export.transforms.rotation import HeadInput
from mbq_runtime.bundle.slice_profile import SliceProfile


class Recorder(Builder[str]):
    """A value is the text of how it was made; ``calls`` has one line a step."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.attentions: list[Attention] = []
        self.factors = np.ones(1, np.float32)

    def _made(self, value: str, what: str) -> str:
        self.calls.append(f"{value} = {what}")
        return value

    def embed(self, embedding: Embedding) -> str:
        if embedding.factors is not None:
            self.factors = embedding.factors
        return self._made("rows" if embedding.rows == "embedding" else embedding.rows, f"embed {embedding.name}")

    def norm(self, residual: str, branch: str | None, norm: Norm, feeds: RoutedLinear) -> tuple[str, str]:
        self._made(norm.name, f"norm {residual} + {branch} for {feeds.unit.name}")
        return norm.name, f"{norm.name}.sum"

    def add(self, residual: str, branch: str | None, name: str, feeds: RoutedLinear) -> tuple[str, str]:
        self._made(name, f"{residual} + {branch} for {feeds.unit.name}")
        return name, name

    def post_norm(self, branch: str, norm: Norm) -> str:
        return self._made(norm.name, f"post_norm {branch}")

    def linear(self, linear: RoutedLinear, x: str, routed_by: str) -> str:
        return self._made(linear.unit.name, f"linear {x} by {routed_by}")

    def attention(self, attention: Attention, qkv: str, feeds: RoutedLinear) -> str:
        self.attentions.append(attention)
        return self._made(attention.name, f"attention {qkv} for {feeds.unit.name}")

    def convolution(self, convolution: Convolution, stacked: str, feeds: RoutedLinear) -> str:
        return self._made(convolution.name, f"{convolution.source} {stacked} for {feeds.unit.name}")

    def delta(self, delta: Delta, stacked: str, feeds: RoutedLinear) -> str:
        return self._made(delta.name, f"{delta.shape.taps} taps {stacked} for {feeds.unit.name}")

    def gate(self, gate: Gate, stacked: str, feeds: RoutedLinear) -> str:
        return self._made(gate.name, f"{gate.activation} {stacked} for {feeds.unit.name}")

    def experts(self, experts: ExpertsStep, layers: tuple[RoutedLinear, RoutedLinear], x: str, routed_by: str) -> str:
        names = " and ".join(layer.unit.name for layer in layers)
        return self._made(experts.name, f"{experts.shape.used} of {experts.shape.count} {names} {x} by {routed_by}")

    def per_layer(self, per_layer: PerLayer, gate: str, given: str, rows: str) -> str:
        return self._made(per_layer.name, f"{per_layer.activation} {gate} * ({per_layer.norm.source} {given} + {rows})")

    def scale(self, residual: str, branch: str, name: str, source: str) -> str:
        return self._made(name, f"({residual} + {branch}) * {source}")

    def final_norm(self, residual: str, branch: str | None, norm: Norm, feeds: RoutedLinear) -> tuple[str, str]:
        return self.norm(residual, branch, norm, feeds)

    def head_input(self, turn: HeadInput, x: str) -> str:
        return self._made("turned", f"head_input {x}")

    def logits(self, head: RoutedLinear, x: str, routed_by: str) -> str:
        return self._made("logits", f"{head.unit.name} {x} by {routed_by}")


def described(name: str, **changes: object) -> Decoder:
    return describe(AutoConfig.for_model(**{"model_type": name, **COMMON, **MODELS[name], **changes}), name)


def calibrated(decoder: Decoder) -> Calibrated:
    """One code for each matrix: the walk does not read them."""
    one = np.ones(1, np.float32)
    sliced = Sliced(*np.ones((3, 1, 1), np.uint8), np.ones((1, 4), np.float16))
    router = RouterParams(one, one, one, one)
    units = {unit.name: RoutedLinear(unit, sliced, None, router) for unit in decoder.units()}
    scale = np.full(decoder.hidden_size, 2, np.float32)
    return Calibrated(SliceProfile.parse("4,4"), 1, "norm", units, None if decoder.tied else sliced, scale)


def walked(decoder: Decoder, calibration: Calibrated) -> Recorder:
    recorder = Recorder()
    walk_head(decoder, calibration, recorder, walk_blocks(decoder, calibration, recorder))
    return recorder


def test_the_steps_of_a_plain_decoder() -> None:
    decoder = described("qwen2", num_hidden_layers=1, layer_types=["full_attention"])
    recorder = walked(decoder, calibrated(decoder))
    assert recorder.calls == [
        "rows = embed head",
        "layers.0.attn_norm = norm rows + None for layers.0.attn_in",
        "layers.0.attn_in = linear layers.0.attn_norm by layers.0.attn_norm.sum",
        "layers.0.attention = attention layers.0.attn_in for layers.0.attn_out",
        "layers.0.attn_out = linear layers.0.attention by layers.0.attention",
        "layers.0.mlp_norm = norm layers.0.attn_norm.sum + layers.0.attn_out for layers.0.mlp_in",
        "layers.0.mlp_in = linear layers.0.mlp_norm by layers.0.mlp_norm.sum",
        "layers.0.mlp.gated = silu layers.0.mlp_in for layers.0.mlp_out",
        "layers.0.mlp_out = linear layers.0.mlp.gated by layers.0.mlp.gated",
        "final_norm = norm layers.0.mlp_norm.sum + layers.0.mlp_out for head",
        "logits = head final_norm by final_norm.sum",
    ]
    # Rows of a tied table are divided by what the head's columns were multiplied by.
    assert (recorder.factors == 0.5).all()
    assert recorder.attentions[0].head_norms is None


def test_quirks_are_steps_or_facts_of_a_step() -> None:
    decoder = described("gemma3_text")
    recorder = walked(decoder, calibrated(decoder))
    assert "layers.1.attn_post_norm = post_norm layers.1.attn_out" in recorder.calls
    assert (
        "layers.1.mlp_norm = norm layers.1.attn_norm.sum + layers.1.attn_post_norm for layers.1.mlp_in"
        in recorder.calls
    )
    sliding, full = recorder.attentions
    assert (sliding.window, full.window) == (16, None)
    assert (sliding.rotary, full.rotary) == ("sliding_attention", "full_attention")
    assert sliding.scale == 48**-0.5
    assert full.head_norms is not None
    assert [full.head_norms.q.source, full.head_norms.k.source] == [
        f"model.layers.1.self_attn.{part}_norm" for part in "qk"
    ]
    assert not full.head_norms.whole_row


def test_a_block_that_only_norms_what_it_adds() -> None:
    decoder = described("olmo3")
    recorder = walked(decoder, calibrated(decoder))
    assert recorder.calls[1:8] == [
        "layers.0.attn_norm.sum = rows + None for layers.0.attn_in",
        "layers.0.attn_in = linear layers.0.attn_norm.sum by layers.0.attn_norm.sum",
        "layers.0.attention = attention layers.0.attn_in for layers.0.attn_out",
        "layers.0.attn_out = linear layers.0.attention by layers.0.attention",
        "layers.0.attn_post_norm = post_norm layers.0.attn_out",
        "layers.0.mlp_norm.sum = layers.0.attn_norm.sum + layers.0.attn_post_norm for layers.0.mlp_in",
        "layers.0.mlp_in = linear layers.0.mlp_norm.sum by layers.0.mlp_norm.sum",
    ]
    norms = recorder.attentions[0].head_norms
    assert norms is not None
    assert norms.whole_row


def test_a_block_with_a_convolution() -> None:
    decoder = described("lfm2")
    recorder = walked(decoder, calibrated(decoder))
    assert recorder.calls[1:5] == [
        "layers.0.conv_norm = norm rows + None for layers.0.conv_in",
        "layers.0.conv_in = linear layers.0.conv_norm by layers.0.conv_norm.sum",
        "layers.0.convolution = model.layers.0.conv.conv layers.0.conv_in for layers.0.conv_out",
        "layers.0.conv_out = linear layers.0.convolution by layers.0.convolution",
    ]
    assert [attention.layer for attention in recorder.attentions] == [1]


def test_a_block_with_a_delta_net() -> None:
    decoder = described("qwen3_5_text")
    recorder = walked(decoder, calibrated(decoder))
    assert recorder.calls[1:5] == [
        "layers.0.delta_norm = norm rows + None for layers.0.delta_in",
        "layers.0.delta_in = linear layers.0.delta_norm by layers.0.delta_norm.sum",
        "layers.0.delta = 4 taps layers.0.delta_in for layers.0.delta_out",
        "layers.0.delta_out = linear layers.0.delta by layers.0.delta",
    ]
    assert [(attention.layer, attention.gates) for attention in recorder.attentions] == [(1, 64)]


def test_a_block_with_experts() -> None:
    decoder = described("qwen3_moe")
    recorder = walked(decoder, calibrated(decoder))
    assert "layers.0.mlp.gated = silu layers.0.mlp_in for layers.0.mlp_out" in recorder.calls
    at = recorder.calls.index("layers.1.attn_out = linear layers.1.attention by layers.1.attention")
    assert recorder.calls[at + 1 : at + 4] == [
        "layers.1.experts_norm = norm layers.1.attn_norm.sum + layers.1.attn_out for layers.1.experts_in",
        "layers.1.experts = 2 of 8 layers.1.experts_in and layers.1.experts_out layers.1.experts_norm"
        " by layers.1.experts_norm.sum",
        "layers.2.attn_norm = norm layers.1.experts_norm.sum + layers.1.experts for layers.2.attn_in",
    ]


def test_a_block_with_per_layer_embeddings() -> None:
    decoder = described("gemma4_text")
    plain = calibrated(decoder)
    recorder = walked(decoder, replace(plain, per_layer=plain.units["head"].sliced))
    assert recorder.calls[:2] == ["rows = embed head", "per_layer.rows = embed per_layer"]
    at = recorder.calls.index("layers.0.mlp_post_norm = post_norm layers.0.mlp_out")
    assert recorder.calls[at + 1 : at + 9] == [
        "layers.0.ple_norm.sum = layers.0.mlp_norm.sum + layers.0.mlp_post_norm for layers.0.ple_in",
        "layers.0.ple_embed = linear rows by rows",
        "layers.0.ple_in = linear layers.0.ple_norm.sum by layers.0.ple_norm.sum",
        "layers.0.ple.gated = gelu_tanh layers.0.ple_in * (model.per_layer_projection_norm layers.0.ple_embed"
        " + per_layer.rows)",
        "layers.0.ple_out = linear layers.0.ple.gated by layers.0.ple.gated",
        "layers.0.ple_post_norm = post_norm layers.0.ple_out",
        "layers.1.attn_norm.sum = (layers.0.ple_norm.sum + layers.0.ple_post_norm) * model.layers.0.layer_scalar",
        "layers.1.attn_norm = norm layers.1.attn_norm.sum + None for layers.1.attn_in",
    ]
    assert recorder.calls[-2] == "final_norm = norm final_norm.sum + None for head"
    norms = [attention.head_norms for attention in recorder.attentions]
    # The third block attends to the keys of the first.
    assert norms[2] is not None
    assert (norms[2].q.source, norms[2].k.source) == (
        "model.layers.2.self_attn.q_norm", "model.layers.0.self_attn.k_norm",
    )  # fmt: skip
    assert all(attention.value_norms and attention.scale == 1 for attention in recorder.attentions)


def test_layers_without_rotation_and_growing_queries() -> None:
    decoder = described("smollm3")
    rotary = [attention.rotary for attention in walked(decoder, calibrated(decoder)).attentions]
    assert rotary == ["full_attention", None, "full_attention"]
    decoder = described("ministral3")
    assert all(attention.grows for attention in walked(decoder, calibrated(decoder)).attentions)


def test_a_table_of_its_own_and_a_turned_head() -> None:
    decoder, one = described("qwen3"), np.ones((1, 1), np.float32)
    recorder = walked(decoder, replace(calibrated(decoder), head_input=HeadInput(one, one, one[0])))
    assert recorder.calls[0] == "rows = embed embedding"
    assert recorder.calls[-2:] == ["turned = head_input final_norm", "logits = head turned by final_norm.sum"]
