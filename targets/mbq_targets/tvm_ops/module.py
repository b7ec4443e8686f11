"""All operations of one model's decoder: an IRModule for Relax to call by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..kernels.emit import module
from ..spec import KernelSpec
from .attention import Attention, attention
from .linear import linear
from .pointwise import embed, gate, head_input, last, norm


@dataclass(frozen=True)
class Shape:
    """What the operations must know of a model when they are compiled; the rest are numbers they are called with.

    activation: between gate and up, a key of ``pointwise.ACTIVATIONS``; head_input: sizes of the two factors of
    the rotation of the head's input, or None.
    """

    spec: KernelSpec
    norm_eps: float
    activation: str
    attention: Attention
    head_input: tuple[int, int] | None


def build_module(shape: Shape) -> Any:
    """IRModule with mbq_embed, norm, add_norm, last, linear, attention, gate, and head_input where it is needed."""
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
    return builder.get()
