"""A calibrated decoder as an ONNX graph.

The graph is the plain decoder of its family with the linear layers that share an input replaced by one
``RoutedMatMul``, the embedding by a ``SlicedGather`` and gates by one op each, all in domain ``ai.mbq``.  Its
inputs and outputs are those ONNX Runtime GenAI expects of a decoder, the logits of the last token alone, with the
input ``avg_bits`` and the output ``avg_bits_used``, and with ``scored`` and ``all_logits`` for scoring a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mbq_runtime.bundle.slice_profile import SliceProfile

from ..calibrate import Calibrated, RoutedLinear
from ..format.codes import Sliced
from ..format.nbits import pack_nbits
from ..format.planes import pack_planes, pack_scales
from ..model.checkpoint import Checkpoint
from ..model.families import Decoder
from .onnx_functions import DOMAIN, DOMAIN_VERSION, GATES, OPSET_IMPORTS, portable_functions

MS = "com.microsoft"

Array = NDArray[np.generic]


@dataclass(frozen=True)
class Layout:
    """How a matrix is stored in the graph.

    pack: its tensors in the order the ops take them; functions: bodies of stock ops for the ops of
    ``ai.mbq``, or none where a native library has them.
    """

    pack: Callable[[Sliced, SliceProfile], dict[str, Array]]
    functions: Callable[[SliceProfile, int, int, bool], list[onnx.FunctionProto]]


def _pack_native(sliced: Sliced, profile: SliceProfile) -> dict[str, Array]:
    return {"planes": pack_planes(sliced.codes, profile), "scales": pack_scales(sliced.scale, sliced.offset)}


LAYOUTS = {
    "mbq16": Layout(_pack_native, lambda profile, group_size, activation_bits, mlp: []),
    "nbits": Layout(
        lambda sliced, profile: dict(pack_nbits(sliced, profile)),
        lambda profile, group_size, activation_bits, mlp: portable_functions(
            profile, group_size, activation_bits, mlp=mlp
        ),
    ),
}

SCORED = "scored"
"""Input that asks for logits of that many of the last tokens."""


@dataclass
class Graph:
    """Nodes and tensors while they are being written."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: dict[str, Array] = field(default_factory=dict)

    def tensor(self, name: str, value: Array) -> str:
        self.tensors[name] = np.ascontiguousarray(value)
        return name

    def node(
        self,
        op: str,
        inputs: list[str],
        name: str,
        domain: str = "",
        outputs: list[str] | None = None,
        **attributes: Any,
    ) -> str:
        """Add a node; its first output is called ``name`` unless ``outputs`` says otherwise."""
        outputs = outputs or [name]
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes))
        return outputs[0]


class _Lowering:
    def __init__(self, checkpoint: Checkpoint, calibrated: Calibrated, layout: Layout) -> None:
        self.checkpoint = checkpoint
        self.decoder: Decoder = checkpoint.decoder
        self.calibrated = calibrated
        self.layout = layout
        self.graph = Graph()
        self.depths: list[str] = []
        self.shared_table: str | None = None

    def build(self) -> Graph:
        g, d = self.graph, self.decoder
        self._attention_inputs()
        head = self._weights("head", self.calibrated.units["head"].sliced)
        own_table = self.calibrated.embedding
        table = head if own_table is None else self._weights("embedding", own_table)
        residual = g.node(
            "SlicedGather", ["input_ids", *table], "embedding", DOMAIN,
            **self._matrix(d.vocab_size, d.hidden_size), depth=self.calibrated.profile.depths,
        )  # fmt: skip
        if own_table is None or d.embedding_scale != 1:
            scale = g.tensor("embedding.scale", self.calibrated.embedding_factors(d))
            residual = g.node("Mul", [residual, scale], "embedding.scaled")
        branch: str | None = None
        for layer in range(d.layers):
            for name, inner in (("attn", self._attention), ("mlp", self._gate)):
                x, residual = self._norm(
                    residual, branch, f"layers.{layer}.{name}_norm", d.input_norm(layer, f"{name}_in")
                )
                branch = self._branch(layer, name, inner, x, residual)
        x, residual = self._norm(residual, branch, "final_norm", d.final_norm)
        self._head(self._head_input(x), residual, head)
        self._bits_used()
        return g

    def _branch(self, layer: int, name: str, inner: Callable[[int, str], str], x: str, residual: str) -> str:
        """Attention or MLP: what is added to the residual.  x: the residual behind its norm."""
        units, calibrated = self.decoder.layer_units(layer), self.calibrated.units
        y = inner(layer, self._linear(calibrated[units[f"{name}_in"].name], x, residual))
        branch = self._linear(calibrated[units[f"{name}_out"].name], y, y)
        post_norm = self.decoder.output_norm(layer, f"{name}_out")
        return branch if post_norm is None else self._plain_norm(branch, post_norm, f"layers.{layer}.{name}_post_norm")

    def _head_input(self, x: str) -> str:
        """``x @ kron.T * gain @ kron``, by its small factors, where the head is tied and rotated."""
        turn = self.calibrated.head_input
        if turn is None:
            return x
        g, a, b = self.graph, len(turn.left), len(turn.right)
        split = g.tensor("head_split", np.array([0, 0, a, b], np.int64))
        flat = g.tensor("flat", np.array([0, 0, -1], np.int64))
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

    def _attention_inputs(self) -> None:
        g = self.graph
        g.tensor("one_axis", np.array([1], np.int64))
        g.tensor("one", np.array(1, np.int64))
        lengths = g.node("ReduceSum", ["attention_mask", "one_axis"], "lengths", keepdims=0)
        last = g.node("Sub", [lengths, "one"], "last_positions")
        g.node("Cast", [last], "seqlens_k", to=TensorProto.INT32)
        shape = g.node("Shape", ["attention_mask"], "mask_shape")
        total = g.node("Gather", [shape, "one"], "total_length", axis=0)
        g.node("Cast", [total], "total_sequence_length", to=TensorProto.INT32)

    def _matrix(self, n: int, k: int) -> dict[str, Any]:
        return {
            "N": n,
            "K": k,
            "group_size": self.calibrated.group_size,
            "slices": list(self.calibrated.profile.slices),
        }

    def _weights(self, name: str, sliced: Sliced) -> list[str]:
        packed = self.layout.pack(sliced, self.calibrated.profile)
        return [self.graph.tensor(f"{name}.{part}", value) for part, value in packed.items()]

    def _norm(self, residual: str, branch: str | None, name: str, source: str) -> tuple[str, str]:
        """RMS norm of residual + branch; returns the norm and the sum."""
        if branch is None:
            return self._plain_norm(residual, source, name), residual
        weight = self.graph.tensor(f"{name}.weight", self.checkpoint.norm(source))
        self.graph.node(
            "SkipSimplifiedLayerNormalization", [residual, branch, weight], name, MS,
            outputs=[name, "", "", f"{name}.sum"], epsilon=self.decoder.norm_eps,
        )  # fmt: skip
        return name, f"{name}.sum"

    def _plain_norm(self, x: str, source: str, name: str) -> str:
        weight = self.graph.tensor(f"{name}.weight", self.checkpoint.norm(source))
        return self.graph.node(
            "SimplifiedLayerNormalization", [x, weight], name, axis=-1, epsilon=self.decoder.norm_eps, stash_type=1
        )

    def _head(self, x: str, routed_by: str, weights: list[str]) -> None:
        """``logits`` of the last token, all that generation looks at, and ``all_logits`` of the last SCORED ones."""
        g, head = self.graph, self.calibrated.units["head"]
        axis, end = g.tensor("one_axis", np.array([1], np.int64)), g.tensor("end", np.array([2**62], np.int64))
        last = g.node("Slice", [x, g.tensor("last", np.array([-1], np.int64)), end, axis], "last_token")
        self._linear(head, last, routed_by, weights, "logits")
        length = g.node("Shape", ["input_ids"], "length", start=1, end=2)
        first = g.node("Sub", [length, SCORED], "first_scored")
        x, routed_by = (g.node("Slice", [part, first, end, axis], f"{part}.scored") for part in (x, routed_by))
        self._linear(head, x, routed_by, weights, "all_logits", again=True)

    def _linear(
        self,
        linear: RoutedLinear,
        x: str,
        routed_by: str,
        weights: list[str] | None = None,
        output: str | None = None,
        again: bool = False,
    ) -> str:
        """routed_by: what the router looks at, see ``routing.inputs``; output: a name instead of the unit's;
        again: its bits are counted elsewhere already."""
        g, name = self.graph, linear.unit.name
        output = output or name
        if weights is None:
            weights = self._weights(name, linear.sliced)
        n, k = linear.sliced.codes.shape
        product = output if linear.bias is None else f"{output}.unbiased"
        depth = f"{output if again else name}.depth"
        inputs = [x, routed_by, "avg_bits", *self._router(linear, weights)]
        g.node("RoutedMatMul", inputs, product, DOMAIN, outputs=[product, depth], **self._matrix(n, k))
        if not again:
            self.depths.append(depth)
        if linear.bias is None:
            return product
        return g.node("Add", [product, g.tensor(f"{name}.bias", linear.bias)], output)

    def _router(self, linear: RoutedLinear, weights: list[str]) -> list[str]:
        """The constant inputs of RoutedMatMul."""
        g, name, router = self.graph, f"{linear.unit.name}.router", linear.router
        # The thresholds are set jointly, so units that have the same table share one tensor.
        table = np.stack([router.budgets, router.thresholds])
        if self.shared_table is None or not np.array_equal(g.tensors[self.shared_table], table):
            self.shared_table = g.tensor("budget_table" if self.shared_table is None else f"{name}.table", table)
        inputs = [self.shared_table, g.tensor(f"{name}.bias", router.bias)]
        inputs += [g.tensor(f"{name}.norm_gain", router.norm_gain), *weights]
        if router.w1 is not None and router.b1 is not None and router.w2 is not None:
            inputs += [g.tensor(f"{name}.w1", router.w1), g.tensor(f"{name}.b1", router.b1)]
            inputs.append(g.tensor(f"{name}.w2", router.w2))
        return inputs

    def _attention(self, layer: int, qkv: str) -> str:
        g, d = self.graph, self.decoder
        prefix = f"layers.{layer}.attention"
        query = [qkv, "", ""]
        if d.family.qk_norm:
            sizes = g.tensor("qkv_sizes", np.asarray(d.qkv_sizes, np.int64))
            parts = [f"{prefix}.{part}" for part in "qkv"]
            g.node("Split", [qkv, sizes], f"{prefix}.split", outputs=parts, axis=-1)
            query = [self._head_norm(layer, part, parts[i]) for i, part in enumerate("qk")] + [parts[2]]
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        present = [f"present.{layer}.{part}" for part in ("key", "value")]
        window = d.window(layer)
        return g.node(
            "GroupQueryAttention",
            [*query, *past, "seqlens_k", "total_sequence_length", *self._rotary(layer)],
            prefix, MS, outputs=[prefix, *present],
            num_heads=d.heads, kv_num_heads=d.kv_heads, scale=d.attention_scale, do_rotary=1, rotary_interleaved=0,
            **({} if window is None else {"local_window_size": window}),
        )  # fmt: skip

    def _rotary(self, layer: int) -> list[str]:
        """cos and sin of a layer; layers of one kind share theirs."""
        kind = self.decoder.rotary_kind(layer)
        names = [f"{kind}.cos", f"{kind}.sin"]
        if names[0] not in self.graph.tensors:
            for name, values in zip(names, self.checkpoint.rotary(kind), strict=True):
                self.graph.tensor(name, values)
        return names

    def _head_norm(self, layer: int, part: str, x: str) -> str:
        g = self.graph
        heads = g.tensor("per_head", np.array([0, 0, -1, self.decoder.head_dim], np.int64))
        flat = g.tensor("flat", np.array([0, 0, -1], np.int64))
        split = g.node("Reshape", [x, heads], f"{x}_heads")
        normed = self._plain_norm(split, self.decoder.head_norm(layer, part), f"{x}_norm")
        return g.node("Reshape", [normed, flat], f"{x}_normed")

    def _gate(self, layer: int, stacked: str) -> str:
        return self.graph.node(GATES[self.decoder.activation], [stacked], f"layers.{layer}.mlp.gated", DOMAIN)

    def _bits_used(self) -> None:
        """avg_bits_used: bits over the step's tokens and all routed linears, weighted by parameters."""
        g, calibrated = self.graph, self.calibrated
        sizes = np.array([linear.parameters for linear in calibrated.units.values()], np.float64)
        share = (sizes / sizes.sum()).astype(np.float32)
        # Entry k - 1 of the table is depth k; depths are lowered to indices by one.
        bits = g.tensor("depth_bits", np.asarray((0, *calibrated.profile.depth_bits), np.float32))
        depths = g.node("Concat", self.depths, "all_depths", axis=0)
        used = g.node("Gather", [bits, depths], "all_bits", axis=0)
        by_unit = g.node("Reshape", [used, g.tensor("by_unit", np.array([len(share), -1], np.int64))], "bits_by_unit")
        average = g.node("ReduceMean", [by_unit, "one_axis"], "average_bits", keepdims=0)
        weighted = g.node("Mul", [average, g.tensor("parameter_share", share)], "weighted_bits")
        g.node("ReduceSum", [weighted], "avg_bits_used", keepdims=1)


def _signature(decoder: Decoder) -> Iterator[tuple[bool, onnx.ValueInfoProto]]:
    """(is input, value) of the graph."""

    def value(name: str, kind: int, shape: list[str | int]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    yield True, value("input_ids", TensorProto.INT64, ["batch", "sequence"])
    yield True, value("attention_mask", TensorProto.INT64, ["batch", "total_sequence"])
    yield True, value("avg_bits", TensorProto.FLOAT, [1])
    yield True, value(SCORED, TensorProto.INT64, [1])
    # A fixed 1 tells onnxruntime-genai to expect no more.
    yield False, value("logits", TensorProto.FLOAT, ["batch", 1, decoder.vocab_size])
    yield False, value("all_logits", TensorProto.FLOAT, ["batch", SCORED, decoder.vocab_size])
    for is_input, name, length in ((True, "past_key_values", "past_sequence"), (False, "present", "total_sequence")):
        for layer in range(decoder.layers):
            for part in ("key", "value"):
                shape: list[str | int] = ["batch", decoder.kv_heads, length, decoder.head_dim]
                yield is_input, value(f"{name}.{layer}.{part}", TensorProto.FLOAT, shape)
    yield False, value("avg_bits_used", TensorProto.FLOAT, [1])


def lower(
    checkpoint: Checkpoint, calibrated: Calibrated, layout_name: str, activation_bits: int = 16
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """The model without its tensors, and the tensors by name, in the order the graph reads them."""
    layout = LAYOUTS[layout_name]
    graph = _Lowering(checkpoint, calibrated, layout).build()
    values = list(_signature(checkpoint.decoder))
    proto = helper.make_graph(
        graph.nodes, "decoder", [v for is_input, v in values if is_input], [v for is_input, v in values if not is_input]
    )
    opsets = [helper.make_opsetid(*item) for item in {**OPSET_IMPORTS, DOMAIN: DOMAIN_VERSION}.items()]
    has_mlp = any(linear.router.w1 is not None for linear in calibrated.units.values())
    functions = layout.functions(calibrated.profile, calibrated.group_size, activation_bits, has_mlp)
    model = helper.make_model(
        proto, opset_imports=opsets, functions=functions, ir_version=10, producer_name="mbq-export"
    )
    return model, graph.tensors
