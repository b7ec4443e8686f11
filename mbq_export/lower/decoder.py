"""The one walk over a decoder.  Every engine's lowering follows it.

A lowering is a ``builder.Builder``.  ``walk_blocks`` and ``walk_head`` call its methods in the order in which the model
computes, and pass on what the methods return.  The walk knows what the model computes: which norms there are, what
each of them reads, which layers see a window.  A builder knows how its engine writes one such step.

To add a quirk of a family: describe it in ``model.families``, call a method of the builder in the walk, and give
that method to ``Builder`` and to the three builders.

Lifecycle of one pass over a token::

    embed
    for each layer:  norm or add -> linear -> attention, convolution or delta -> linear [-> post_norm]
                     norm or add -> linear -> gate                            -> linear [-> post_norm]
                                 or experts, or both and [-> post_norm]
                     [add -> two linears -> per_layer -> linear -> post_norm]
                     [scale]
    final_norm [-> head_input] -> logits

A family without norms before its blocks adds where the others norm.  With per-layer embeddings, ``embed`` is called a
second time, for their table.

The walk does not add a branch (the output of attention or MLP) to the residual stream.  It gives both to the next
``norm``, because engines add and norm in one kernel.  It also tells each step which linear layer reads the result
(``feeds``), because an engine can run that layer's router in the same kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic

import numpy as np

from ..calibrated import Calibrated, RoutedLinear
from ..model import per_layer
from ..model.checkpoint import Checkpoint
from ..model.shape import Decoder
from .builder import (
    Attention,
    Builder,
    Convolution,
    Delta,
    Embedding,
    ExpertsStep,
    Gate,
    HeadNorms,
    Norm,
    PerLayer,
    V,
)

PER_LAYER_TABLE = "per_layer"
"""First part of the names of the tensors of the table of per-layer embeddings."""


@dataclass(frozen=True)
class Stream(Generic[V]):
    """The residual stream behind the last block.

    residual: the stream, [tokens, hidden]; branch: what is still to be added to it, None for nothing.
    """

    residual: V
    branch: V | None


def in_engine_order(checkpoint: Checkpoint, calibrated: Calibrated) -> Calibrated:
    """Put the rows of q, k, v and gates in the order of an engine, see ``Checkpoint.engine_order``.

    Args:
        checkpoint: the model.
        calibrated: its slices and routers, with rows in the order of the checkpoint.

    Returns:
        The same object where a family is in this order.
    """
    d = checkpoint.decoder
    if not (d.family.interleaved or d.family.channel_gates):
        return calibrated
    units = dict(calibrated.units)
    for layer in (layer for layer in range(d.layers) if d.mixer(layer) == "attn"):
        name = d.layer_units(layer)["attn_in"].name
        linear, order = units[name], checkpoint.engine_order(layer)
        bias = None if linear.bias is None else linear.bias[order]
        units[name] = replace(linear, sliced=linear.sliced.rows(order), bias=bias)
    return replace(calibrated, units=units)


def first_depths(decoder: Decoder, calibrated: Calibrated, slices: Sequence[str]) -> dict[str, int]:
    """The first depth that reads the tensor of each slice, by name.

    Args:
        decoder: shape of the model.
        calibrated: its slices and routers.
        slices: last parts of the names of a matrix's slices, in order.
    """
    names = dict.fromkeys([*calibrated.units, _embedding(decoder, calibrated).name])
    names |= {} if calibrated.per_layer is None else {PER_LAYER_TABLE: None}
    return {f"{name}.{part}": depth for name in names for depth, part in enumerate(slices, 1)}


def walk_blocks(decoder: Decoder, calibrated: Calibrated, builder: Builder[V]) -> Stream[V]:
    """Call the builder from the tokens up to the last block.

    Args:
        decoder: shape of the model.
        calibrated: its slices and routers.
        builder: what is called.

    Returns:
        The stream that ``walk_head`` takes.
    """
    embedded = residual = builder.embed(_embedding(decoder, calibrated))
    branch, rows = None, None
    if (table := _per_layer_table(decoder, calibrated)) is not None:
        rows = builder.embed(table)
    for layer in range(decoder.layers):
        linears = {role: calibrated.units[unit.name] for role, unit in decoder.layer_units(layer).items()}
        for part in decoder.readers(layer):
            reads, writes = linears[f"{part}_in"], linears[f"{part}_out"]
            name, source = f"layers.{layer}.{part}_norm", decoder.input_norm(layer, f"{part}_in")
            if source is None:
                x, residual = builder.add(residual, branch, f"{name}.sum", reads)
            else:
                x, residual = builder.norm(residual, branch, Norm(name, source), reads)
            if part == "experts":
                branch = builder.experts(_experts(decoder, layer), (reads, writes), x, residual)
            else:
                given = builder.linear(linears["ple_embed"], embedded, embedded) if part == "ple" else None
                stacked = builder.linear(reads, x, residual)
                if given is not None and rows is not None:
                    inner = builder.per_layer(_per_layer(decoder, layer), stacked, given, rows)
                else:
                    inner = _inner(decoder, layer, part, builder, stacked, writes)
                branch = builder.linear(writes, inner, inner)
            branch = _post_normed(decoder, layer, part, builder, branch)
            if part == "mlp" and "experts" in decoder.branches(layer):
                beside = (linears["experts_in"], linears["experts_out"])
                branch = _and_experts(decoder, layer, builder, beside, residual, branch)
        if (scalar := decoder.layer_scalar(layer)) is not None and branch is not None:
            reader = (
                f"layers.{layer + 1}.{decoder.mixer(layer + 1)}_norm" if layer + 1 < decoder.layers else "final_norm"
            )
            residual, branch = builder.scale(residual, branch, f"{reader}.sum", scalar), None
    return Stream(residual, branch)


def _post_normed(decoder: Decoder, layer: int, part: str, builder: Builder[V], branch: V) -> V:
    """What a part of a block puts out, behind its norm if it has one."""
    source = decoder.output_norm(layer, f"{part}_out")
    return branch if source is None else builder.post_norm(branch, Norm(f"layers.{layer}.{part}_post_norm", source))


def _and_experts(
    decoder: Decoder,
    layer: int,
    builder: Builder[V],
    layers: tuple[RoutedLinear, RoutedLinear],
    residual: V,
    of_mlp: V,
) -> V:
    """The sum of what an MLP and the experts beside it put out.  residual: the stream that both read."""
    source = decoder.input_norm(layer, "experts_in")
    assert source is not None
    x, _ = builder.norm(residual, None, Norm(f"layers.{layer}.experts_norm", source), layers[0])
    outputs = builder.experts(_experts(decoder, layer), layers, x, residual)
    of_experts = _post_normed(decoder, layer, "experts", builder, outputs)
    both, _ = builder.add(of_mlp, of_experts, f"layers.{layer}.both", layers[1])
    return _post_normed(decoder, layer, "both", builder, both)


def _inner(decoder: Decoder, layer: int, part: str, builder: Builder[V], stacked: V, writes: RoutedLinear) -> V:
    """What a part of a block computes between its two linear layers."""
    if part == "attn":
        return builder.attention(_attention(decoder, layer), stacked, writes)
    if part == "delta" and decoder.delta is not None:
        return builder.delta(Delta(f"layers.{layer}.delta", layer, decoder.delta), stacked, writes)
    if part == "conv":
        convolution = Convolution(f"layers.{layer}.convolution", layer, decoder.convolution(layer))
        return builder.convolution(convolution, stacked, writes)
    return builder.gate(Gate(f"layers.{layer}.mlp.gated", decoder.activation), stacked, writes)


def walk_head(decoder: Decoder, calibrated: Calibrated, builder: Builder[V], stream: Stream[V]) -> V:
    """Call the builder from the last block to the logits.

    Args:
        decoder: shape of the model.
        calibrated: its slices and routers.
        builder: what is called.
        stream: result of ``walk_blocks``.

    Returns:
        The builder's logits.
    """
    head = calibrated.units[decoder.head.name]
    norm = Norm("final_norm", decoder.final_norm)
    x, residual = builder.final_norm(stream.residual, stream.branch, norm, head)
    if calibrated.head_input is not None:
        x = builder.head_input(calibrated.head_input, x)
    return builder.logits(head, x, residual)


def _embedding(decoder: Decoder, calibrated: Calibrated) -> Embedding:
    own = calibrated.embedding
    factors = calibrated.embedding_factors(decoder)
    if own is None:
        return Embedding(decoder.head.name, calibrated.units[decoder.head.name].sliced, factors)
    return Embedding("embedding", own, factors if decoder.embedding_scale != 1 else None)


def _experts(decoder: Decoder, layer: int) -> ExpertsStep:
    assert decoder.experts is not None
    return ExpertsStep(f"layers.{layer}.experts", layer, decoder.experts, decoder.activation)


def _per_layer(decoder: Decoder, layer: int) -> PerLayer:
    of_table = Norm("per_layer.norm", per_layer.NORM)
    return PerLayer(f"layers.{layer}.ple.gated", layer, of_table, decoder.activation)


def _per_layer_table(decoder: Decoder, calibrated: Calibrated) -> Embedding | None:
    if calibrated.per_layer is None:
        return None
    factors = np.full(decoder.per_layer_width, decoder.per_layer_scale, np.float32)
    return Embedding(PER_LAYER_TABLE, calibrated.per_layer, factors, f"{PER_LAYER_TABLE}.rows")


def _attention(decoder: Decoder, layer: int) -> Attention:
    name = f"layers.{layer}.attention"
    norms, sources = decoder.family.head_norms, decoder.head_norms(layer)
    head_norms = None
    if norms is not None and sources is not None:
        q, k = (Norm(f"{name}.{part}_norm", source) for part, source in zip("qk", sources, strict=True))
        head_norms = HeadNorms(q, k, norms.whole_row, norms.rotated_first)
    return Attention(
        name,
        layer,
        rotary=decoder.rotary_kind(layer),
        window=decoder.window(layer),
        scale=decoder.attention_scale,
        head_norms=head_norms,
        cap=decoder.attention_cap,
        grows=decoder.query_growth is not None,
        gates=decoder.head_gates,
        value_norms=decoder.family.value_norms,
    )
