"""Lowers a calibrated decoder to a Relax module for TVM.

Each step calls an operation of ``mbq_targets.tvm_ops`` by name.  A parameter is a place in one weights file, given to
the call as a number (see ``tvm_weights``).  All functions of the module have one signature:

    (ids i64 [M], past i64 [1], avg_bits f32 [2], used f32 [1],
     keys f32 [layers, kv_heads, blocks, head_dim, 16], values f32 [layers, kv_heads, positions, head_dim],
     weights u8 [bytes]) -> logits f32 [M', vocab, padded to row blocks]

With keys and values of 8 bits, both are u8 [layers, kv_heads, positions, head_dim + 4] (``format.attention``).

A decoder whose layers have heads of several shapes takes keys and values of each (``facts.by_shape``).  One with short
convolutions takes their states behind ``values``; one with delta nets states and memories (``tvm_ops.delta``).

``decode`` takes M = 1.  ``prefill`` returns the logits of the last token, ``score`` of all tokens.  Each function
writes the cache and ``used``, the average bits of the pass, in place.

The cache is not TVM's paged cache, for two reasons.  TVM's cache rotates by formulas of its own, but a decoder has
tables of rotations (longrope, two kinds of layers in one model).  And its attention on a processor is a plain loop on
one thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mbq_runtime.bundle.facts import by_shape
from mbq_runtime.bundle.layout import KEY_LANES, ROW_BLOCK, kv_row_bytes
from mbq_runtime.bundle.tensors import Entry
from mbq_targets.spec import KernelSpec

from ..calibrated import Calibrated, HeadInput, RoutedLinear
from ..format.planes import weight_inputs
from ..model.checkpoint import Checkpoint
from .builder import Attention, Builder, Convolution, Delta, Embedding, ExpertsStep, Gate, Norm, PerLayer
from .decoder import first_depths, in_engine_order, walk_blocks, walk_head
from .tvm_weights import QUERY_GROWTH, Array, collect, delta_tensors, expert_tensors, head_norm_tensors, places

_PREFIX = "mbq_"
"""Of the symbols of operations."""


class Lowered(NamedTuple):
    """A decoder as a Relax module and its weights.

    module: for ``mbq_targets.build.build_decoder``; tensors: what the weights file holds, by name;
    entries: where it holds them; depths: the first depth that reads a tensor, 1 for a tensor that is not named.
    """

    module: Any
    tensors: dict[str, Array]
    entries: dict[str, Entry]
    depths: dict[str, int]


def lower(checkpoint: Checkpoint, calibrated: Calibrated, spec: KernelSpec, *, folder: Path | None = None) -> Lowered:
    """Lower a decoder to TVM.

    Args:
        checkpoint: norms, rotations and shape of the model.
        calibrated: its slices and routers.
        spec: number format of the kernels.
        folder: where packed matrices of experts wait in files without names; None to hold them in memory.

    Returns:
        The module and its weights.
    """
    from tvm import relax, tirx

    calibrated = in_engine_order(checkpoint, calibrated)
    tensors = collect(checkpoint, calibrated, folder)
    slices = weight_inputs(calibrated.profile)[: calibrated.profile.depths]
    depths = first_depths(checkpoint.decoder, calibrated, slices)
    entries = places(tensors, depths)
    functions = relax.BlockBuilder(_operations(checkpoint, calibrated, spec, tensors))
    tokens = tirx.Var("tokens", "int64")
    for name, rows, wanted in (("decode", 1, 1), ("prefill", tokens, 1), ("score", tokens, tokens)):
        parameters = _parameters(checkpoint, entries, rows, spec.kv_bits)
        with functions.function(name, list(parameters.values())):
            # Operations write the cache in place.  A dataflow block could reorder them, so there is none.
            builder = RelaxBuilder(checkpoint, calibrated, entries, functions, parameters, rows=rows, wanted=wanted)
            stream = walk_blocks(checkpoint.decoder, calibrated, builder)
            functions.emit_func_output(walk_head(checkpoint.decoder, calibrated, builder, stream))
    return Lowered(functions.get(), tensors, entries, depths)


def _operations(checkpoint: Checkpoint, calibrated: Calibrated, spec: KernelSpec, tensors: Mapping[str, Array]) -> Any:
    """IRModule of the operations.  tensors: with the tables of rotations."""
    from mbq_targets.tvm_ops.attention import Attention as Heads
    from mbq_targets.tvm_ops.module import Shape, build_module

    d, turn = checkpoint.decoder, calibrated.head_input
    norms = d.family.head_norms

    def rotated(layers: list[int]) -> int:
        """How many of a head's first numbers are rotated."""
        kinds = [kind for layer in layers if (kind := d.rotary_kind(layer)) is not None]
        return 2 * tensors[f"{kinds[0]}.cos"].shape[1] if kinds else 0

    heads = tuple(
        Heads(
            d.heads, *shape, rotated(layers), d.attention_scale, None if norms is None else d.norm_eps,
            norm_rows=norms is not None and norms.whole_row, norm_last=norms is not None and norms.rotated_first,
            some_still=any(d.rotary_kind(layer) is None for layer in range(d.layers)),
            cap=d.attention_cap, grows=d.query_growth is not None, gates=d.head_gates,
            kv_bits=spec.kv_bits, value_norms=d.family.value_norms, some_share=d.some_share,
        )
        for shape, layers in by_shape(d.caches).items()
    )  # fmt: skip
    factors = None if turn is None else (len(turn.left), len(turn.right))
    adds = bool(d.per_layer_size) or any(len(d.normed_units(layer)) != 2 for layer in range(d.layers))
    convolution = None
    if layers := [layer for layer in range(d.layers) if d.mixer(layer) == "conv"]:
        convolution = (d.conv_taps, checkpoint.taps(d.convolution(layers[0]))[1] is not None)
    shape = Shape(
        spec, d.norm_eps, d.activation, heads, factors, adds, d.logits_cap, convolution, d.delta,
        per_layer=bool(d.per_layer_size), scales=d.family.layer_scalars, experts=d.experts,
    )  # fmt: skip
    return build_module(shape)


def _parameters(checkpoint: Checkpoint, entries: dict[str, Entry], rows: Any, kv_bits: int) -> dict[str, Any]:
    """Parameters of one function, by name.  rows: tokens that it takes; kv_bits: bits of a cached key or value."""
    from tvm import relax, tirx

    d = checkpoint.decoder
    blocks, positions = tirx.Var("blocks", "int64"), tirx.Var("positions", "int64")
    shapes: dict[str, tuple[list[Any], str]] = {
        "ids": ([rows], "int64"),
        "past": ([1], "int64"),
        "avg_bits": ([2], "float32"),
        "used": ([1], "float32"),
    }
    for index, ((kv_heads, head_dim), layers) in enumerate(by_shape(d.caches).items()):
        keys, values = _cache_names(index)
        if kv_bits == 8:
            cache = ([len(layers), kv_heads, positions, kv_row_bytes(head_dim, kv_bits)], "uint8")
            shapes |= {keys: cache, values: cache}
        else:
            shapes[keys] = ([len(layers), kv_heads, blocks, head_dim, KEY_LANES], "float32")
            shapes[values] = ([len(layers), kv_heads, positions, head_dim], "float32")
    kept = d.layers - d.layers_of("attn_in")
    if d.delta is not None:
        shapes["states"] = ([kept, d.delta.taps - 1, d.delta.channels], "float32")
        shapes["memories"] = ([kept, *d.delta.states["recurrent"]], "float32")
    elif kept:
        shapes["states"] = ([kept, d.conv_taps - 1, d.hidden_size], "float32")
    shapes["weights"] = ([max(entry.place + entry.size for entry in entries.values())], "uint8")
    return {name: relax.Var(name, relax.TensorType(shape, dtype)) for name, (shape, dtype) in shapes.items()}


def _cache_names(index: int) -> tuple[str, str]:
    """The parameters with the keys and the values of heads of one shape.  index: its place in ``by_shape``."""
    return (f"keys_{index}", f"values_{index}") if index else ("keys", "values")


class RelaxBuilder(Builder[Any]):
    """Writes the calls of one function.  A value is a Relax variable, float32 [tokens, width].

    Args:
        checkpoint: shape of the model.
        calibrated: its slices and routers.
        entries: where the weights file holds each tensor.
        functions: relax.BlockBuilder that the calls are added to.
        parameters: the function's, by name.
        rows: tokens that the function takes.
        wanted: the last tokens, whose logits it returns.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        calibrated: Calibrated,
        entries: dict[str, Entry],
        functions: Any,
        parameters: dict[str, Any],
        *,
        rows: Any,
        wanted: Any,
    ) -> None:
        self.checkpoint, self.decoder = checkpoint, checkpoint.decoder
        self.profile, self.entries = calibrated.profile, entries
        self.functions, self.parameters = functions, parameters
        self.rows, self.wanted = rows, wanted
        self.routed_parameters = sum(linear.parameters for linear in calibrated.units.values())

    def embed(self, embedding: Embedding) -> Any:
        numbers = [self._place(f"{embedding.name}.{part}") for part in weight_inputs(self.profile)]
        rows, width = embedding.table.codes.shape
        numbers += [self._place(f"{embedding.rows}.scale"), rows]
        return self._call("embed", ["ids", "avg_bits", "weights", "used"], numbers, (self.rows, width))

    def norm(self, residual: Any, branch: Any | None, norm: Norm, feeds: RoutedLinear) -> tuple[Any, Any]:
        from tvm import relax

        if branch is None:
            return self._norm(residual, norm), residual
        shape = (self.rows, self.decoder.hidden_size)
        both = self._call("add_norm", [residual, branch, "weights"], [self._place(norm.source)], shape, shape)
        summed, normed = (self.functions.emit(relax.TupleGetItem(both, i)) for i in range(2))
        return normed, summed

    def add(self, residual: Any, branch: Any | None, name: str, feeds: RoutedLinear) -> tuple[Any, Any]:
        if branch is None:
            return residual, residual
        summed = self._call("add", [residual, branch], [], (self.rows, self.decoder.hidden_size))
        return summed, summed

    def post_norm(self, branch: Any, norm: Norm) -> Any:
        return self._norm(branch, norm)

    def linear(self, linear: RoutedLinear, x: Any, routed_by: Any) -> Any:
        return self._linear(linear, x, routed_by, self.rows)

    def attention(self, attention: Attention, qkv: Any, feeds: RoutedLinear) -> Any:
        from mbq_targets.tvm_ops.attention import STILL
        from mbq_targets.tvm_ops.module import attention_name

        d = self.decoder
        rotary = [STILL, STILL]
        gains = [self._place(name) for name in head_norm_tensors(self.checkpoint, attention.layer)] or [0, 0]
        if attention.rotary is not None:
            rotary = [self._place(f"{attention.rotary}.{part}") for part in ("cos", "sin")]
        # The scale, the soft cap and how heads are normed are compiled into the operation.
        of, shapes = d.heads_of(attention.layer), by_shape(d.caches)
        layers = shapes[of.kv_heads, of.head_dim]
        numbers = [layers.index(of.source), *rotary, *gains, attention.window or d.context_length]
        numbers += [self._place(QUERY_GROWTH)] if attention.grows else []
        numbers += [int(d.shares(attention.layer))] if d.some_share else []
        index = list(shapes.values()).index(layers)
        tensors = [qkv, "past", *_cache_names(index), "weights"]
        operation = attention_name(index).removeprefix(_PREFIX)
        return self._call(operation, tensors, numbers, (self.rows, d.heads * of.head_dim))

    def convolution(self, convolution: Convolution, stacked: Any, feeds: RoutedLinear) -> Any:
        names = (f"{convolution.source}.{part}" for part in ("taps", "bias"))
        places = [self._place(name) for name in names if name in self.entries]
        numbers = [self._index(convolution.layer), *places]
        return self._call("convolution", [stacked, "states", "weights"], numbers, (self.rows, self.decoder.hidden_size))

    def delta(self, delta: Delta, stacked: Any, feeds: RoutedLinear) -> Any:
        places = [self._place(name) for name in delta_tensors(self.checkpoint, delta.layer)]
        tensors = [stacked, "states", "memories", "weights"]
        return self._call("delta", tensors, [self._index(delta.layer), *places], (self.rows, delta.shape.values))

    def _index(self, layer: int) -> int:
        """The index of a block among those with the same mixer: states have no gaps."""
        d = self.decoder
        return sum(d.mixer(before) == d.mixer(layer) for before in range(layer))

    def gate(self, gate: Gate, stacked: Any, feeds: RoutedLinear) -> Any:
        # The activation is compiled into the operation.
        return self._call("gate", [stacked], [], (self.rows, feeds.sliced.codes.shape[1]))

    def experts(self, experts: ExpertsStep, layers: tuple[RoutedLinear, RoutedLinear], x: Any, routed_by: Any) -> Any:
        from tvm import relax

        used, (reads, writes) = experts.shape.used, layers
        places = [self._place(name) for name in expert_tensors(self.checkpoint, experts.layer)]
        shapes = ((self.rows, used), (self.rows, used))
        both = self._call("choose", [x, "weights"], places, *shapes, dtypes=("int64", "float32"))
        chosen, shares = (self.functions.emit(relax.TupleGetItem(both, i)) for i in range(2))
        stacked = self._of_chosen(reads, x, chosen, routed_by)
        gated = self._call("gate", [stacked], [], (self.rows * used, experts.shape.ffn_size))
        outputs = self._of_chosen(writes, gated, chosen, routed_by)
        return self._call("add_experts", [outputs, shares], [], (self.rows, self.decoder.hidden_size))

    def _of_chosen(self, linear: RoutedLinear, x: Any, chosen: Any, routed_by: Any) -> Any:
        """Each token by the matrices of its experts, a row for each of them."""
        from mbq_targets.tvm_ops.experts import fields

        experts = linear.unit.experts
        assert experts is not None
        numbers = self._numbers(linear, fields(self.profile))
        tensors = [x, chosen, routed_by, "avg_bits", "weights", "used"]
        shape = (self.rows * experts.used, len(linear.sliced.codes) // experts.count)
        return self._call("experts_linear", tensors, numbers, shape)

    def per_layer(self, per_layer: PerLayer, gate: Any, given: Any, rows: Any) -> Any:
        size = self.decoder.per_layer_size
        numbers = [per_layer.layer * size, self._place(per_layer.norm.source)]
        return self._call("per_layer", [gate, given, rows, "weights"], numbers, (self.rows, size))

    def scale(self, residual: Any, branch: Any, name: str, source: str) -> Any:
        shape = (self.rows, self.decoder.hidden_size)
        return self._call("scale", [residual, branch, "weights"], [self._place(source)], shape)

    def final_norm(self, residual: Any, branch: Any | None, norm: Norm, feeds: RoutedLinear) -> tuple[Any, Any]:
        x, residual = self.norm(residual, branch, norm, feeds)
        if self.wanted is not self.rows:
            x = self._call("last", [x], [], (self.wanted, self.decoder.hidden_size))
        return x, residual

    def head_input(self, turn: HeadInput, x: Any) -> Any:
        places = [self._place(f"head_input.{part}") for part in ("left_back", "left", "right", "right_back", "gain")]
        return self._call("head_input", [x, "weights"], places, (self.wanted, self.decoder.hidden_size))

    def logits(self, head: RoutedLinear, x: Any, routed_by: Any) -> Any:
        logits = self._linear(head, x, routed_by, self.wanted)
        if self.decoder.logits_cap is None:
            return logits
        return self._call("cap", [logits], [], (self.wanted, -(-self.decoder.vocab_size // ROW_BLOCK) * ROW_BLOCK))

    def _call(
        self, operation: str, tensors: list[Any], numbers: list[int], *shapes: tuple[Any, int],
        dtypes: tuple[str, ...] = (),
    ) -> Any:  # fmt: skip
        """One operation.  tensors: variables, or names of parameters; shapes, dtypes: of its results, or float32."""
        from tvm import relax

        args = [self.parameters[t] if isinstance(t, str) else t for t in tensors]
        of_results = zip(shapes, dtypes or ["float32"] * len(shapes), strict=True)
        kinds = [relax.TensorType(list(shape), dtype) for shape, dtype in of_results]
        given = relax.Tuple([*args, *map(relax.prim_value, numbers)])
        returned = kinds[0] if len(kinds) == 1 else kinds
        return self.functions.emit(relax.op.call_dps_packed(_PREFIX + operation, given, returned))

    def _place(self, name: str) -> int:
        return self.entries[name].place

    def _norm(self, x: Any, norm: Norm) -> Any:
        shape = (self.rows, self.decoder.hidden_size)
        return self._call("norm", [x, "weights"], [self._place(norm.source)], shape)

    def _linear(self, linear: RoutedLinear, x: Any, routed_by: Any, rows: Any) -> Any:
        from mbq_targets.tvm_ops.linear import fields

        n = linear.sliced.codes.shape[0]
        tensors = [x, routed_by, "avg_bits", "weights", "used"]
        padded = -(-n // ROW_BLOCK) * ROW_BLOCK
        return self._call("linear", tensors, self._numbers(linear, fields(self.profile)), (rows, padded))

    def _numbers(self, linear: RoutedLinear, fields: tuple[str, ...]) -> list[int]:
        """The numbers of one linear layer, in the order of ``fields``."""
        return [self._number(linear, field) for field in fields]

    def _number(self, linear: RoutedLinear, field: str) -> int:
        from mbq_targets.tvm_ops.linear import NONE

        name, router = linear.unit.name, linear.router
        known = {
            "entries": len(router.budgets),
            "hidden": 0 if router.w1 is None else len(router.w1),
            "parameters": linear.parameters,
            "all_parameters": self.routed_parameters,
            "count": 1 if linear.unit.experts is None else linear.unit.experts.count,
        }
        stored = {
            **{part: f"{name}.{part}" for part in (*weight_inputs(self.profile), "bias")},
            **{part: f"{name}.router.{part}" for part in ("table", "norm_gain", "w1", "b1", "w2")},
            "router_bias": f"{name}.router.bias",
        }  # fmt: skip
        if field in known:
            return known[field]
        entry = self.entries.get(stored[field])
        # The operation asks whether there is a bias.  It does not read w1, b1 and w2 where hidden is 0.
        return entry.place if entry else NONE if field == "bias" else 0
