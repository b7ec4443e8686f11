"""Lowers a calibrated decoder to an ONNX graph.

The graph is the plain decoder of its family with three changes, all in domain ``ai.mbq``: one ``RoutedMatMul``
replaces the linear layers that share an input, a ``SlicedGather`` replaces the embedding, and one op replaces each
gate.  Inputs and outputs are those that ONNX Runtime GenAI expects of a decoder, with the logits of the last token
alone.  The input ``avg_bits`` and the output ``avg_bits_used`` are added, and ``scored`` and ``all_logits`` to score
a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper

from mbq_runtime.bundle.layout import NATIVE_LAYOUT, PORTABLE_LAYOUT, kv_row_bytes
from mbq_runtime.bundle.slice_profile import SliceProfile

from ..calibrated import Calibrated, HeadInput, RoutedLinear
from ..format import nbits, planes
from ..format.codes import Sliced
from ..model.checkpoint import Checkpoint
from ..model.mapped_weights import arrays_in_file
from ..model.shape import Decoder
from .builder import Attention, Builder, Convolution, Delta, Embedding, ExpertsStep, Gate, Norm, PerLayer
from .decoder import first_depths, in_engine_order, walk_blocks, walk_head
from .onnx_attention import MS, AttentionNodes
from .onnx_delta import delta_nodes
from .onnx_experts import ExpertNodes
from .onnx_functions import GATES, portable_functions
from .onnx_graph import Array, Graph
from .onnx_text import DOMAIN, DOMAIN_VERSION, OPSET_IMPORTS

SCORED = "scored"
"""Input that asks for logits of that many of the last tokens."""


@dataclass(frozen=True)
class Layout:
    """How the graph stores a matrix.

    pack: makes the tensors of a matrix, in the order in which the ops take them; inputs: their names, those of the
    slices first; portable: whether the model holds bodies of stock ops for the ops of ``ai.mbq``.  Without them a
    native library must have the ops.
    """

    pack: Callable[[Sliced, SliceProfile], Mapping[str, Array]]
    inputs: Callable[[SliceProfile], tuple[str, ...]]
    portable: bool


LAYOUTS = {
    NATIVE_LAYOUT: Layout(planes.pack_matrix, planes.weight_inputs, portable=False),
    PORTABLE_LAYOUT: Layout(nbits.pack_nbits, nbits.weight_inputs, portable=True),
}
"""By the layout's name in the manifest."""


class Lowered(NamedTuple):
    """A decoder as an ONNX model.

    model: the graph without its tensors; tensors: by name, in the order in which the graph reads them; depths: the
    first depth that reads a tensor, by name, 1 for a tensor that is not named.
    """

    model: onnx.ModelProto
    tensors: dict[str, Array]
    depths: dict[str, int]


def lower(
    checkpoint: Checkpoint,
    calibrated: Calibrated,
    layout_name: str,
    activation_bits: int = 16,
    *,
    kv_bits: int = 32,
    folder: Path | None = None,
) -> Lowered:
    """Lower a decoder to ONNX.

    Args:
        checkpoint: norms, rotations and shape of the model.
        calibrated: its slices and routers.
        layout_name: a key of ``LAYOUTS``.
        activation_bits: 8 or 16, of the integers that the portable ops round activations to.
        kv_bits: bits of a cached key or value: 32 for float32, or 8, which only a native graph can have.
        folder: where packed matrices of experts wait in files without names; None to hold them in memory.

    Returns:
        The model and its tensors.
    """
    layout, decoder = LAYOUTS[layout_name], checkpoint.decoder
    calibrated = in_engine_order(checkpoint, calibrated)
    builder = OnnxBuilder(checkpoint, calibrated, layout, kv_bits=kv_bits, folder=folder)
    builder.attentions.positions()
    walk_head(decoder, calibrated, builder, walk_blocks(decoder, calibrated, builder))
    builder.bits_used()
    values = list(_signature(decoder, kv_bits))
    graph = helper.make_graph(
        builder.graph.nodes,
        "decoder",
        [value for is_input, value in values if is_input],
        [value for is_input, value in values if not is_input],
    )
    functions = []
    if layout.portable:
        learned = any(linear.router.w1 is not None for linear in calibrated.units.values())
        functions = portable_functions(calibrated.profile, calibrated.group_size, activation_bits, mlp=learned)
    opsets = [helper.make_opsetid(*item) for item in {**OPSET_IMPORTS, DOMAIN: DOMAIN_VERSION}.items()]
    model = helper.make_model(
        graph, opset_imports=opsets, functions=functions, ir_version=10, producer_name="mbq-export"
    )
    slices = layout.inputs(calibrated.profile)[: calibrated.profile.depths]
    return Lowered(model, builder.graph.tensors, first_depths(decoder, calibrated, slices))


class OnnxBuilder(Builder[str]):
    """Writes nodes.  A value is the name of a float32 tensor, [batch, tokens, width].

    Args:
        checkpoint: norms, rotations and shape of the model.
        calibrated: its slices and routers.
        layout: how matrices are stored.
        kv_bits: bits of a cached key or value, 8 or 32.
        folder: where packed matrices of experts wait, see ``lower``.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        calibrated: Calibrated,
        layout: Layout,
        *,
        kv_bits: int = 32,
        folder: Path | None = None,
    ) -> None:
        self.checkpoint, self.decoder = checkpoint, checkpoint.decoder
        self.calibrated, self.layout, self.folder = calibrated, layout, folder
        self.graph = Graph()
        self.depths: list[str] = []
        self.shared_table: str | None = None
        self.matrices: dict[str, list[str]] = {}
        self.attentions = AttentionNodes(self.graph, checkpoint, kv_bits)
        self.expert_nodes = ExpertNodes(self.graph, checkpoint)

    def embed(self, embedding: Embedding) -> str:
        g = self.graph
        # The head's tensors come first in the file, also where the embedding has its own.
        self._weights("head", self.calibrated.units["head"].sliced)
        table = self._weights(embedding.name, embedding.table)
        rows = g.node(
            "SlicedGather", ["input_ids", "avg_bits", *table], embedding.rows, DOMAIN,
            **self._shape(*embedding.table.codes.shape), depth=self.calibrated.profile.depths,
        )  # fmt: skip
        if embedding.factors is None:
            return rows
        factors = g.tensor(f"{embedding.rows}.scale", embedding.factors)
        return g.node("Mul", [rows, factors], f"{embedding.rows}.scaled")

    def norm(self, residual: str, branch: str | None, norm: Norm, feeds: RoutedLinear) -> tuple[str, str]:
        if branch is None:
            return self.attentions.norm(residual, norm), residual
        weight = self.graph.tensor(f"{norm.name}.weight", self.checkpoint.norm(norm.source))
        self.graph.node(
            "SkipSimplifiedLayerNormalization", [residual, branch, weight], norm.name, MS,
            outputs=[norm.name, "", "", f"{norm.name}.sum"], epsilon=self.decoder.norm_eps,
        )  # fmt: skip
        return norm.name, f"{norm.name}.sum"

    def add(self, residual: str, branch: str | None, name: str, feeds: RoutedLinear) -> tuple[str, str]:
        summed = residual if branch is None else self.graph.node("Add", [residual, branch], name)
        return summed, summed

    def post_norm(self, branch: str, norm: Norm) -> str:
        return self.attentions.norm(branch, norm)

    def linear(self, linear: RoutedLinear, x: str, routed_by: str) -> str:
        product, depth = self._routed(linear, x, routed_by, linear.unit.name, f"{linear.unit.name}.depth")
        self.depths.append(depth)
        return product

    def attention(self, attention: Attention, qkv: str, feeds: RoutedLinear) -> str:
        return self.attentions.attend(attention, qkv)

    def convolution(self, convolution: Convolution, stacked: str, feeds: RoutedLinear) -> str:
        g, name, layer = self.graph, convolution.name, convolution.layer
        taps, bias = self.checkpoint.taps(convolution.source)
        sizes = g.numbers("conv_sizes", *[self.decoder.hidden_size] * 3)
        b, c, x = (f"{name}.{part}" for part in "bcx")
        g.node("Split", [stacked, sizes], f"{name}.split", outputs=[b, c, x], axis=-1)
        channels = g.node("Transpose", [g.node("Mul", [b, x], f"{name}.bx")], f"{name}.channels", perm=[0, 2, 1])
        inputs = [channels, g.tensor(f"{name}.taps", taps[:, None])]
        inputs += ["" if bias is None else g.tensor(f"{name}.bias", bias), f"past.{layer}.conv"]
        g.node(
            "CausalConvWithState", inputs, f"{name}.convolved", MS,
            outputs=[f"{name}.convolved", f"present.{layer}.conv"], ndim=1, activation="none",
        )  # fmt: skip
        tokens = g.node("Transpose", [f"{name}.convolved"], f"{name}.tokens", perm=[0, 2, 1])
        return g.node("Mul", [c, tokens], name)

    def delta(self, delta: Delta, stacked: str, feeds: RoutedLinear) -> str:
        return delta_nodes(self.graph, self.checkpoint, delta, stacked)

    def gate(self, gate: Gate, stacked: str, feeds: RoutedLinear) -> str:
        return self.graph.node(GATES[gate.activation], [stacked], gate.name, DOMAIN)

    def experts(self, experts: ExpertsStep, layers: tuple[RoutedLinear, RoutedLinear], x: str, routed_by: str) -> str:
        nodes, (reads, writes) = self.expert_nodes, layers
        gate = Gate(f"{experts.name}.gated", experts.activation)
        chosen = nodes.choose(experts, x)
        if not self.layout.portable:
            gated = self.gate(gate, self._of_chosen(reads, x, chosen.indices, routed_by), writes)
            return nodes.added(experts, self._of_chosen(writes, gated, chosen.indices, routed_by), chosen)
        gated = self.gate(gate, nodes.apart(experts, self.linear(reads, x, routed_by)), writes)
        name, depth = writes.unit.name, f"{writes.unit.name}.depth"
        self.depths.append(depth)
        row = nodes.side_by_side(experts, gated, chosen)
        return self._routed(writes, row, routed_by, name, depth, side_by_side=experts.shape.count)[0]

    def _of_chosen(self, linear: RoutedLinear, x: str, chosen: str, routed_by: str) -> str:
        """One ExpertsMatMul.  chosen: indices of the experts of each token."""
        name, depth, experts = linear.unit.name, f"{linear.unit.name}.depth", linear.unit.experts
        assert experts is not None
        weights = self._router(linear, self._weights(name, linear.sliced))
        self.graph.node(
            "ExpertsMatMul", [x, chosen, routed_by, "avg_bits", *weights], name, DOMAIN, outputs=[name, depth],
            **self._shape(*linear.sliced.codes.shape), experts=experts.count,
        )  # fmt: skip
        self.depths.append(depth)
        return name

    def per_layer(self, per_layer: PerLayer, gate: str, given: str, rows: str) -> str:
        g, d, name = self.graph, self.decoder, per_layer.name
        parts = [f"{rows}.{layer}" for layer in range(d.layers)]
        if per_layer.layer == 0:
            sizes = g.numbers("per_layer_sizes", *[d.per_layer_size] * d.layers)
            g.node("Split", [rows, sizes], f"{rows}.split", outputs=parts, axis=-1)
        normed = self.attentions.norm(given, per_layer.norm, f"{name}.normed")
        summed = g.node("Add", [normed, parts[per_layer.layer]], f"{name}.summed")
        if per_layer.activation == "silu":
            opened = g.node("Mul", [gate, g.node("Sigmoid", [gate], f"{name}.sigmoid")], f"{name}.opened")
        else:
            opened = g.node("Gelu", [gate], f"{name}.opened", approximate="tanh")
        return g.node("Mul", [opened, summed], name)

    def scale(self, residual: str, branch: str, name: str, source: str) -> str:
        g = self.graph
        summed = g.node("Add", [residual, branch], f"{name}.unscaled")
        return g.node("Mul", [summed, g.tensor(source, self.checkpoint.scalar(source))], name)

    def final_norm(self, residual: str, branch: str | None, norm: Norm, feeds: RoutedLinear) -> tuple[str, str]:
        return self.norm(residual, branch, norm, feeds)

    def head_input(self, turn: HeadInput, x: str) -> str:
        g, a, b = self.graph, len(turn.left), len(turn.right)
        split, flat = g.numbers("head_split", 0, 0, a, b), g.numbers("flat", 0, 0, -1)
        tensors = {"left": turn.left, "left_back": turn.left.T, "right": turn.right, "right_back": turn.right.T}
        names = {part: g.tensor(f"head_input.{part}", value) for part, value in tensors.items()}
        gain = g.tensor("head_input.gain", turn.gain.reshape(a, b))
        y = g.node("Reshape", [x, split], "head_input.split")
        y = g.node("MatMul", [names["left"], y], "head_input.unturned_left")
        y = g.node("MatMul", [y, names["right_back"]], "head_input.unturned")
        y = g.node("Mul", [y, gain], "head_input.gained")
        y = g.node("MatMul", [names["left_back"], y], "head_input.turned_left")
        y = g.node("MatMul", [y, names["right"]], "head_input.turned")
        return g.node("Reshape", [y, flat], "head_input")

    def logits(self, head: RoutedLinear, x: str, routed_by: str) -> str:
        """``logits`` of the last token, which generation reads, and ``all_logits`` of the last SCORED tokens.

        Args:
            head: slices and router of the head.
            x: input of the head.
            routed_by: what the router reads.

        Returns:
            The name of the last token's logits.
        """
        g = self.graph
        axis, end = g.numbers("one_axis", 1), g.numbers("end", 2**62)
        last = g.node("Slice", [x, g.numbers("last", -1), end, axis], "last_token")
        logits, depth = self._routed(head, last, routed_by, self._uncapped("logits"), "head.depth")
        self.depths.append(depth)
        logits = self._capped(logits, "logits")
        length = g.node("Shape", ["input_ids"], "length", start=1, end=2)
        first = g.node("Sub", [length, SCORED], "first_scored")
        scored, scored_by = (g.node("Slice", [part, first, end, axis], f"{part}.scored") for part in (x, routed_by))
        # These depths are not counted: the last token's product has counted every token.
        every, _ = self._routed(head, scored, scored_by, self._uncapped("all_logits"), "all_logits.depth")
        self._capped(every, "all_logits")
        return logits

    def bits_used(self) -> None:
        """Make ``avg_bits_used``: bits over the pass's tokens and all routed linears, weighted by parameters."""
        g, calibrated = self.graph, self.calibrated
        sizes = np.array([linear.parameters for linear in calibrated.units.values()], np.float64)
        share = (sizes / sizes.sum()).astype(np.float32)
        # Depths count from 1: the table starts with an entry that is not used.
        bits = g.tensor("depth_bits", np.asarray((0, *calibrated.profile.depth_bits), np.float32))
        depths = g.node("Concat", self.depths, "all_depths", axis=0)
        used = g.node("Gather", [bits, depths], "all_bits", axis=0)
        by_unit = g.node("Reshape", [used, g.numbers("by_unit", len(share), -1)], "bits_by_unit")
        average = g.node("ReduceMean", [by_unit, "one_axis"], "average_bits", keepdims=0)
        weighted = g.node("Mul", [average, g.tensor("parameter_share", share)], "weighted_bits")
        g.node("ReduceSum", [weighted], "avg_bits_used", keepdims=1)

    def _shape(self, n: int, k: int) -> dict[str, Any]:
        """Attributes of an op with an [n, k] matrix."""
        calibrated = self.calibrated
        return {"N": n, "K": k, "group_size": calibrated.group_size, "slices": list(calibrated.profile.slices)}

    def _weights(self, name: str, sliced: Sliced, side_by_side: int = 1) -> list[str]:
        """Names of a matrix's tensors; a tied table is stored once."""
        if name not in self.matrices:
            packed = self.layout.pack(sliced, self.calibrated.profile)
            if side_by_side > 1:
                packed = nbits.side_by_side(packed, side_by_side)
            if self.folder is not None and ".experts_" in name:
                packed = arrays_in_file(packed, self.folder)
            self.matrices[name] = [self.graph.tensor(f"{name}.{part}", value) for part, value in packed.items()]
        return self.matrices[name]

    def _routed(
        self, linear: RoutedLinear, x: str, routed_by: str, output: str, depth: str, *, side_by_side: int = 1
    ) -> tuple[str, str]:
        """One RoutedMatMul and its bias.

        output, depth: names of the product and of the tokens' depths; side_by_side: into how many parts the rows are
        cut, which then stand beside each other.
        """
        g, name = self.graph, linear.unit.name
        n, k = linear.sliced.codes.shape
        n, k = n // side_by_side, k * side_by_side
        weights = self._weights(name, linear.sliced, side_by_side)
        product = output if linear.bias is None else f"{output}.unbiased"
        inputs = [x, routed_by, "avg_bits", *self._router(linear, weights)]
        g.node("RoutedMatMul", inputs, product, DOMAIN, outputs=[product, depth], **self._shape(n, k))
        if linear.bias is None:
            return product, depth
        return g.node("Add", [product, g.tensor(f"{name}.bias", linear.bias)], output), depth

    def _router(self, linear: RoutedLinear, weights: list[str]) -> list[str]:
        """The constant inputs of RoutedMatMul."""
        g, name, router = self.graph, f"{linear.unit.name}.router", linear.router
        # Thresholds are set jointly: units that have the same table share one tensor.
        table = np.stack([router.budgets, router.thresholds])
        if self.shared_table is None or not np.array_equal(g.tensors[self.shared_table], table):
            self.shared_table = g.tensor("budget_table" if self.shared_table is None else f"{name}.table", table)
        inputs = [self.shared_table, g.tensor(f"{name}.bias", router.bias)]
        inputs += [g.tensor(f"{name}.norm_gain", router.norm_gain), *weights]
        if router.w1 is not None and router.b1 is not None and router.w2 is not None:
            inputs += [g.tensor(f"{name}.w1", router.w1), g.tensor(f"{name}.b1", router.b1)]
            inputs.append(g.tensor(f"{name}.w2", router.w2))
        return inputs

    def _uncapped(self, name: str) -> str:
        return name if self.decoder.logits_cap is None else f"{name}.uncapped"

    def _capped(self, x: str, name: str) -> str:
        """``cap * tanh(x / cap)``, or x where the model has no soft cap."""
        if self.decoder.logits_cap is None:
            return x
        g, cap = self.graph, self.decoder.logits_cap
        scalars = [
            g.tensor(f"logits_cap.{what}", np.array(v, np.float32)) for what, v in (("in", 1 / cap), ("out", cap))
        ]
        small = g.node("Tanh", [g.node("Mul", [x, scalars[0]], f"{name}.small")], f"{name}.tanh")
        return g.node("Mul", [small, scalars[1]], name)


def _signature(decoder: Decoder, kv_bits: int) -> Iterator[tuple[bool, onnx.ValueInfoProto]]:
    """(is input, value) of the graph."""

    def value(name: str, kind: int, shape: list[str | int]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    yield True, value("input_ids", TensorProto.INT64, ["batch", "sequence"])
    if kv_bits == 32:
        yield True, value("attention_mask", TensorProto.INT64, ["batch", "total_sequence"])
    else:
        yield True, value("position_ids", TensorProto.INT64, ["batch", "sequence"])
    yield True, value("avg_bits", TensorProto.FLOAT, [2])
    yield True, value(SCORED, TensorProto.INT64, [1])
    # A fixed 1 tells onnxruntime-genai that the graph returns the last token alone.
    yield False, value("logits", TensorProto.FLOAT, ["batch", 1, decoder.vocab_size])
    yield False, value("all_logits", TensorProto.FLOAT, ["batch", SCORED, decoder.vocab_size])
    for is_input, name, length in ((True, "past_key_values", "past_sequence"), (False, "present", "total_sequence")):
        for layer in range(decoder.layers):
            if decoder.delta is not None and decoder.mixer(layer) == "delta":
                for part, sides in decoder.delta.states.items():
                    state = f"{name.removesuffix('_key_values')}.{layer}.{part}"
                    yield is_input, value(state, TensorProto.FLOAT, ["batch", *sides])
                continue
            if decoder.mixer(layer) == "conv":
                held: list[str | int] = ["batch", decoder.hidden_size, decoder.conv_taps - 1]
                yield is_input, value(f"{name.removesuffix('_key_values')}.{layer}.conv", TensorProto.FLOAT, held)
                continue
            if decoder.shares(layer):
                continue
            of = decoder.heads_of(layer)
            for part in ("key", "value"):
                row = of.head_dim if kv_bits == 32 else kv_row_bytes(of.head_dim, kv_bits)
                kind = TensorProto.FLOAT if kv_bits == 32 else TensorProto.UINT8
                shape: list[str | int] = ["batch", of.kv_heads, length, row]
                yield is_input, value(f"{name}.{layer}.{part}", kind, shape)
    yield False, value("avg_bits_used", TensorProto.FLOAT, [1])
