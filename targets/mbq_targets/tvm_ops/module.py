"""All operations of one decoder, as an IRModule. Relax calls them by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..kernels.emit import module
from ..spec import DeltaNet, Experts, KernelSpec
from .attention import Attention, attention
from .delta import delta
from .experts import add_experts, choose, experts_linear
from .linear import linear
from .per_layer import per_layer
from .pointwise import add, cap, convolution, embed, gate, head_input, last, norm, scale


@dataclass(frozen=True)
class Shape:
    """What is compiled into the operations of a model. All other numbers are arguments.

    spec: slices, group size and activation bits.
    norm_eps: added to the mean square in RMS norms.
    activation: of the gate, a key of ``kernels.gate.ACTIVATIONS``.
    attention: the heads, one entry for each shape of heads that occurs.
    head_input: sizes of the two factors of the rotation of the head's input, or None.
    adds: some sums are read without a norm.
    logits_cap: soft cap of the logits, or None.
    convolution: taps of short convolutions, and whether they have a bias; None for no convolutions.
    delta: the gated delta nets; None for none.
    per_layer: whether there are per-layer embeddings.
    scales: whether the residual stream is multiplied by numbers.
    experts: the experts of blocks that have some; None for none.
    """

    spec: KernelSpec
    norm_eps: float
    activation: str
    attention: tuple[Attention, ...]
    head_input: tuple[int, int] | None
    adds: bool = False
    logits_cap: float | None = None
    convolution: tuple[int, bool] | None = None
    delta: DeltaNet | None = None
    per_layer: bool = False
    scales: bool = False
    experts: Experts | None = None


def attention_name(index: int) -> str:
    """The symbol of the attention of one shape of heads.

    Args:
        index: its place in ``Shape.attention``.
    """
    return f"mbq_attention_{index}" if index else "mbq_attention"


def build_module(shape: Shape) -> Any:
    """IRModule with the operations: mbq_embed, mbq_norm, mbq_add_norm, mbq_last, mbq_linear, mbq_attention, mbq_gate,
    mbq_head_input, mbq_add, mbq_cap, mbq_convolution, mbq_delta, mbq_per_layer, mbq_scale, mbq_choose,
    mbq_experts_linear, mbq_add_experts. The attention of further shapes of heads is mbq_attention_1, and so on.

    Args:
        shape: what is compiled in. Without ``head_input`` there is no mbq_head_input, without ``adds`` no mbq_add,
            without ``logits_cap`` no mbq_cap, without ``convolution`` no mbq_convolution, without ``delta`` no
            mbq_delta, without ``per_layer`` no mbq_per_layer, without ``scales`` no mbq_scale, without ``experts``
            none of the last three.
    """
    with module() as builder:
        embed(shape.spec.profile, shape.spec.group_size, "mbq_embed")
        norm(shape.norm_eps, "mbq_norm", adds=False)
        norm(shape.norm_eps, "mbq_add_norm", adds=True)
        last("mbq_last")
        linear(shape.spec, "mbq_linear")
        for index, heads in enumerate(shape.attention):
            attention(heads, attention_name(index))
        gate(shape.activation, "mbq_gate")
        if shape.head_input is not None:
            head_input(*shape.head_input, "mbq_head_input")
        if shape.adds:
            add("mbq_add")
        if shape.logits_cap is not None:
            cap(shape.logits_cap, "mbq_cap")
        if shape.convolution is not None:
            convolution(shape.convolution[0], "mbq_convolution", bias=shape.convolution[1])
        if shape.delta is not None:
            delta(shape.delta, shape.norm_eps, "mbq_delta")
        if shape.per_layer:
            per_layer(shape.norm_eps, shape.activation, "mbq_per_layer")
        if shape.scales:
            scale("mbq_scale")
        if shape.experts is not None:
            choose(shape.experts, "mbq_choose")
            experts_linear(shape.spec, "mbq_experts_linear")
            add_experts("mbq_add_experts")
    return builder.get()
