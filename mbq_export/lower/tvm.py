"""A calibrated decoder as a Relax module: the same decoder as ``lower.onnx`` writes, for TVM.

Every step calls an operation of ``mbq_targets.tvm_ops`` by name; parameters are places in one file, numbers that the
calls carry.  The functions of the module share the signature

    (ids i64 [M], past i64 [1], avg_bits f32 [1], used f32 [1],
     keys f32 [layers, kv_heads, blocks, head_dim, 16], values f32 [layers, kv_heads, positions, head_dim],
     weights u8 [bytes]) -> logits f32 [M', vocab, padded to row blocks]

``decode`` is for M = 1; ``prefill`` gives the logits of the last token alone, ``score`` of all.  The cache and
``used``, the pass's average bits, are written in place.  The cache is not TVM's paged one: that rotates by
formulas of its own, where a decoder's description holds the model's very tables (longrope, two kinds of layers in
one model), and its attention on a processor is a plain loop on one thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mbq_runtime.bundle.tensors import Entry
from mbq_runtime.errors import ModelError
from mbq_targets.spec import KernelSpec

from ..calibrate import Calibrated, RoutedLinear
from ..model.checkpoint import Checkpoint
from ..model.families import Decoder
from .tvm_weights import Array, collect, places

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3")
"""Families this lowering has been tested with."""

_ROW_BLOCK = 16
_KEY_LANES = 16


def check(decoder: Decoder) -> None:
    """Raises ModelError for a family without a lowering to TVM."""
    if decoder.family.model_type not in FAMILIES:
        raise ModelError(
            f"family {decoder.family.model_type} has no lowering to TVM; those that have: {', '.join(FAMILIES)}; "
            "use --engine onnx"
        )


@dataclass(frozen=True)
class Lowered:
    """module: for ``mbq_targets.build.build_decoder``; tensors, entries: what the weights file holds, and where."""

    module: Any
    tensors: dict[str, Array]
    entries: dict[str, Entry]


def lower(checkpoint: Checkpoint, calibrated: Calibrated, spec: KernelSpec) -> Lowered:
    """Raises ModelError, see ``check``."""
    check(checkpoint.decoder)
    tensors = collect(checkpoint, calibrated)
    entries = places(tensors)
    return Lowered(_Lowering(checkpoint, calibrated, spec, tensors, entries).build(), tensors, entries)


class _Lowering:
    def __init__(
        self,
        checkpoint: Checkpoint,
        calibrated: Calibrated,
        spec: KernelSpec,
        tensors: dict[str, Array],
        entries: dict[str, Entry],
    ) -> None:
        from tvm import relax

        self.relax = relax
        self.decoder, self.spec = checkpoint.decoder, spec
        self.calibrated = calibrated
        self.tensors = tensors
        self.entries = entries
        self.weights_bytes = max(entry.place + entry.size for entry in entries.values())
        self.routed = sum(linear.parameters for linear in calibrated.units.values())
        self.builder = relax.BlockBuilder(self._operations())

    def _operations(self) -> Any:
        """IRModule of what the functions call."""
        from mbq_targets.tvm_ops.attention import Attention
        from mbq_targets.tvm_ops.module import Shape, build_module

        d, turn = self.decoder, self.calibrated.head_input
        rotated = 2 * self.tensors[f"{d.rotary_kind(0)}.cos"].shape[1]
        attention = Attention(
            d.heads, d.kv_heads, d.head_dim, rotated, d.attention_scale, d.norm_eps if d.family.qk_norm else None
        )
        factors = None if turn is None else (len(turn.left), len(turn.right))
        shape = Shape(self.spec, d.norm_eps, d.activation, attention, factors)
        return build_module(shape)

    def build(self) -> Any:
        from tvm import tirx

        tokens = tirx.Var("tokens", "int64")
        for name, rows, wanted in (("decode", 1, 1), ("prefill", tokens, 1), ("score", tokens, tokens)):
            self._function(name, rows, wanted)
        return self.builder.get()

    def _function(self, name: str, rows: Any, wanted: Any) -> None:
        """rows: tokens it takes; wanted: the last ones, whose logits it returns."""
        from tvm import tirx

        relax, d = self.relax, self.decoder
        blocks, positions = tirx.Var("blocks", "int64"), tirx.Var("positions", "int64")
        shapes: dict[str, tuple[list[Any], str]] = {
            "ids": ([rows], "int64"),
            "past": ([1], "int64"),
            "avg_bits": ([1], "float32"),
            "used": ([1], "float32"),
            "keys": ([d.layers, d.kv_heads, blocks, d.head_dim, _KEY_LANES], "float32"),
            "values": ([d.layers, d.kv_heads, positions, d.head_dim], "float32"),
            "weights": ([self.weights_bytes], "uint8"),
        }
        params = {key: relax.Var(key, relax.TensorType(shape, kind)) for key, (shape, kind) in shapes.items()}
        with self.builder.function(name, list(params.values())):
            self.params, self.rows, self.wanted = params, rows, wanted
            # What an operation writes besides its result has no place in a dataflow block: calls stay in order.
            self.builder.emit_func_output(self._decoder())

    def _call(self, operation: str, tensors: list[Any], numbers: list[int], *shapes: tuple[Any, int]) -> Any:
        """One operation.  tensors: variables, or names of parameters; shapes: of its float32 results."""
        relax = self.relax
        args = [self.params[t] if isinstance(t, str) else t for t in tensors]
        kinds = [relax.TensorType(list(shape), "float32") for shape in shapes]
        given = relax.Tuple([*args, *map(relax.prim_value, numbers)])
        returned = kinds[0] if len(kinds) == 1 else kinds
        return self.builder.emit(relax.op.call_dps_packed(f"mbq_{operation}", given, returned))

    def _place(self, name: str) -> int:
        return self.entries[name].place

    def _decoder(self) -> Any:
        d = self.decoder
        table = "head" if self.calibrated.embedding is None else "embedding"
        numbers = [self._place(f"{table}.{part}") for part in ("planes", "scales")]
        numbers += [self._place("embedding.scale"), d.vocab_size]
        residual = self._call("embed", ["ids", "weights", "used"], numbers, (self.rows, d.hidden_size))
        branch = None
        for layer in range(d.layers):
            for name, inner in (("attn", self._attention), ("mlp", self._gate)):
                x, residual = self._norm(residual, branch, d.input_norm(layer, f"{name}_in"))
                branch = self._branch(layer, name, inner, x, residual)
        x, residual = self._norm(residual, branch, d.final_norm)
        return self._head(x, residual)

    def _head(self, x: Any, residual: Any) -> Any:
        d = self.decoder
        width = (self.wanted, d.hidden_size)
        if self.wanted is not self.rows:
            x = self._call("last", [x], [], width)
        if self.calibrated.head_input is not None:
            parts = ("left_back", "left", "right", "right_back", "gain")
            x = self._call("head_input", [x, "weights"], [self._place(f"head_input.{part}") for part in parts], width)
        return self._linear(self.calibrated.units["head"], x, residual, self.wanted)

    def _branch(self, layer: int, name: str, inner: Any, x: Any, residual: Any) -> Any:
        """Attention or MLP: what is added to the residual.  x: the residual behind its norm."""
        units, linears = self.decoder.layer_units(layer), self.calibrated.units
        y = inner(layer, self._linear(linears[units[f"{name}_in"].name], x, residual, self.rows))
        branch = self._linear(linears[units[f"{name}_out"].name], y, y, self.rows)
        post_norm = self.decoder.output_norm(layer, f"{name}_out")
        return branch if post_norm is None else self._plain_norm(branch, post_norm)

    def _norm(self, residual: Any, branch: Any, source: str) -> tuple[Any, Any]:
        """RMS norm of residual + branch; returns the norm and the sum."""
        if branch is None:
            return self._plain_norm(residual, source), residual
        shape = (self.rows, self.decoder.hidden_size)
        both = self._call("add_norm", [residual, branch, "weights"], [self._place(source)], shape, shape)
        summed, normed = (self.builder.emit(self.relax.TupleGetItem(both, i)) for i in range(2))
        return normed, summed

    def _plain_norm(self, x: Any, source: str) -> Any:
        return self._call("norm", [x, "weights"], [self._place(source)], (self.rows, self.decoder.hidden_size))

    def _linear(self, linear: RoutedLinear, x: Any, routed_by: Any, rows: Any) -> Any:
        n = linear.sliced.codes.shape[0]
        numbers = list(self._numbers(linear))
        return self._call(
            "linear", [x, routed_by, "avg_bits", "weights", "used"], numbers, (rows, -(-n // _ROW_BLOCK) * _ROW_BLOCK)
        )

    def _numbers(self, linear: RoutedLinear) -> Iterator[int]:
        """In the order of ``tvm_ops.linear.FIELDS``."""
        from mbq_targets.tvm_ops.linear import FIELDS, NONE

        name, router = linear.unit.name, linear.router
        known = {
            "entries": len(router.budgets),
            "hidden": 0 if router.w1 is None else len(router.w1),
            "parameters": linear.parameters,
            "all_parameters": self.routed,
        }
        stored = {
            "planes": f"{name}.planes", "scales": f"{name}.scales", "bias": f"{name}.bias",
            **{part: f"{name}.router.{part}" for part in ("table", "norm_gain", "w1", "b1", "w2")},
            "router_bias": f"{name}.router.bias",
        }  # fmt: skip
        for field in FIELDS:
            if field in known:
                yield known[field]
            else:
                entry = self.entries.get(stored[field])
                # Pointers to what is absent are made but never followed, bias alone is asked for.
                yield entry.place if entry else NONE if field == "bias" else 0

    def _attention(self, layer: int, qkv: Any) -> Any:
        d = self.decoder
        kind = d.rotary_kind(layer)
        norms = [self._place(d.head_norm(layer, part)) if d.family.qk_norm else 0 for part in "qk"]
        window = d.window(layer) or d.context_length
        numbers = [layer, self._place(f"{kind}.cos"), self._place(f"{kind}.sin"), *norms, window]
        tensors = [qkv, "past", "keys", "values", "weights"]
        return self._call("attention", tensors, numbers, (self.rows, d.heads * d.head_dim))

    def _gate(self, layer: int, stacked: Any) -> Any:
        return self._call("gate", [stacked], [], (self.rows, self.decoder.ffn_size))
