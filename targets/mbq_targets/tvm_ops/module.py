"""All operations of one decoder, as an IRModule. Relax calls them by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..kernels.emit import module
from ..spec import DeltaNet, KernelSpec
from .attention import Attention, attention
from .delta import delta
from .linear import linear
from .pointwise import add, cap, convolution, embed, gate, head_input, last, norm


@dataclass(frozen=True)
class Shape:
    """What is compiled into the operations of a model. All other numbers are arguments.

    spec: slices, group size and activation bits.
    norm_eps: added to the mean square in RMS norms.
    activation: of the gate, a key of ``kernels.gate.ACTIVATIONS``.
    attention: the heads.
    head_input: sizes of the two factors of the rotation of the head's input, or None.
    adds: some sums are read without a norm.
    logits_cap: soft cap of the logits, or None.
    convolution: taps of short convolutions, and whether they have a bias; None for no convolutions.
    delta: the gated delta nets; None for none.
    """

    spec: KernelSpec
    norm_eps: float
    activation: str
    attention: Attention
    head_input: tuple[int, int] | None
    adds: bool = False
    logits_cap: float | None = None
    convolution: tuple[int, bool] | None = None
    delta: DeltaNet | None = None


def build_module(shape: Shape) -> Any:
    """IRModule with the operations: mbq_embed, mbq_norm, mbq_add_norm, mbq_last, mbq_linear, mbq_attention, mbq_gate,
    mbq_head_input, mbq_add, mbq_cap, mbq_convolution, mbq_delta.

    Args:
        shape: what is compiled in. Without ``head_input`` there is no mbq_head_input, without ``adds`` no mbq_add,
            without ``logits_cap`` no mbq_cap, without ``convolution`` no mbq_convolution, without ``delta`` no
            mbq_delta.
    """
    with module() as builder:
        embed(shape.spec.profile, shape.spec.group_size, "mbq_embed")
        norm(shape.norm_eps, "mbq_norm", adds=False)
        norm(shape.norm_eps, "mbq_add_norm", adds=True)
        last("mbq_last")
        linear(shape.spec, "mbq_linear")
        attention(shape.attention, "mbq_attention")
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
    return builder.get()
