"""The nodes of attention in an ONNX graph: what comes between the stacked projection and the attended values."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from ..model.checkpoint import Checkpoint
from .builder import Attention, Norm
from .onnx_graph import Graph
from .onnx_text import DOMAIN

MS = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""


class AttentionNodes:
    """Writes the nodes of attention.

    Args:
        graph: where nodes and constants go.
        checkpoint: norms, rotations and shape of the model.
        kv_bits: bits of a cached key or value: 32 for ONNX Runtime's operator, 8 for that of this project.
    """

    def __init__(self, graph: Graph, checkpoint: Checkpoint, kv_bits: int) -> None:
        self.graph, self.checkpoint, self.decoder, self.kv_bits = graph, checkpoint, checkpoint.decoder, kv_bits
        self.values: dict[str, str] = {}

    def positions(self) -> None:
        """Make what attention asks for: how many tokens there are, and how many with the cache."""
        g = self.graph
        axis = g.numbers("one_axis", 1)
        if self.kv_bits == 8:
            # ONNX Runtime plans memory for each shape of an input, and a mask has another one in each pass.
            places = g.node("Reshape", ["position_ids", g.numbers("in_a_row", -1)], "places")
            self.values["past_tokens"] = g.node("Gather", [places, g.numbers("first", 0)], "past_tokens")
            return
        one = g.tensor("one", np.array(1, np.int64))
        lengths = g.node("ReduceSum", ["attention_mask", axis], "lengths", keepdims=0)
        last = g.node("Sub", [lengths, one], "last_positions")
        g.node("Cast", [last], "seqlens_k", to=TensorProto.INT32)
        shape = g.node("Shape", ["attention_mask"], "mask_shape")
        total = g.node("Gather", [shape, one], "total_length", axis=0)
        g.node("Cast", [total], "total_sequence_length", to=TensorProto.INT32)

    def _tokens(self) -> str:
        """int64 [1]: how many tokens the pass has."""
        if "tokens" not in self.values:
            self.values["tokens"] = self.graph.node("Shape", ["input_ids"], "tokens", start=1, end=2)
        return self.values["tokens"]

    def attend(self, attention: Attention, qkv: str) -> str:
        """Write one layer's attention, with its cache.

        Args:
            attention: what the layer does.
            qkv: queries, keys and values, stacked.

        Returns:
            The attended values.
        """
        g, d = self.graph, self.decoder
        of, norms = d.heads_of(attention.layer), attention.head_norms
        together = norms is None and not attention.grows and not attention.gates
        query = [qkv, "", ""] if together else self._separate_heads(attention, qkv)
        rotates = attention.rotary is not None and not (norms is not None and norms.rotated_first)
        tables = self._rotary(attention.rotary) if rotates and attention.rotary is not None else []
        past = [f"past_key_values.{attention.layer}.{part}" for part in ("key", "value")]
        present = [f"present.{attention.layer}.{part}" for part in ("key", "value")]
        name = f"{attention.name}.ungated" if attention.gates else attention.name
        if d.shares(attention.layer):
            # The keys and values of an earlier block, which that block has written, and none besides.
            past, present = [f"present.{of.source}.{part}" for part in ("key", "value")], []
        heads: dict[str, Any] = {
            "outputs": [name, *present], "num_heads": d.heads, "kv_num_heads": of.kv_heads, "scale": attention.scale
        }  # fmt: skip
        if self.kv_bits == 8:
            attended = g.node(
                "CachedAttention", [*query, *past, self._past_tokens(), *tables], name, DOMAIN, **heads,
                window=attention.window or 0, softcap=float(attention.cap or 0),
            )  # fmt: skip
        else:
            more: dict[str, Any] = {} if attention.window is None else {"local_window_size": attention.window}
            more |= {} if attention.cap is None else {"softcap": attention.cap}
            attended = g.node(
                "GroupQueryAttention", [*query, *past, "seqlens_k", "total_sequence_length", *tables], name, MS,
                **heads, do_rotary=int(rotates), rotary_interleaved=0, **more,
            )  # fmt: skip
        return self._gated(attention, attended) if attention.gates else attended

    def _gated(self, attention: Attention, attended: str) -> str:
        """Each head times the sigmoid of its gate, or each of its channels."""
        g, d = self.graph, self.decoder
        opening = g.node("Sigmoid", [f"{attention.name}.g"], f"{attention.name}.opening")
        if attention.gates > 1:
            return g.node("Mul", [attended, opening], attention.name)
        of_heads = g.numbers("gate_of_heads", 0, 0, d.heads, 1)
        opening = g.node("Reshape", [opening, of_heads], f"{attention.name}.opening_of_heads")
        heads = g.node("Reshape", [attended, g.numbers("per_head", 0, 0, -1, d.head_dim)], f"{attended}_heads")
        gated = g.node("Mul", [heads, opening], f"{attention.name}.gated_heads")
        return g.node("Reshape", [gated, g.numbers("flat", 0, 0, -1)], attention.name)

    def norm(self, x: str, norm: Norm, name: str | None = None) -> str:
        """Write an RMS norm.

        Args:
            x: what is normed, [..., width].
            norm: which norm.
            name: of the result, where several nodes have one norm; None: the norm's.
        """
        weight = self.graph.tensor(f"{norm.name}.weight", self.checkpoint.norm(norm.source))
        return self._normed(x, weight, name or norm.name)

    def _normed(self, x: str, weight: str, name: str) -> str:
        return self.graph.node(
            "SimplifiedLayerNormalization", [x, weight], name,
            axis=-1, epsilon=self.decoder.norm_eps, stash_type=1,
        )  # fmt: skip

    def _separate_heads(self, attention: Attention, qkv: str) -> list[str]:
        """q, k and v as three tensors, with what comes between their product and the cache, rotation apart."""
        g, norms, d = self.graph, attention.head_norms, self.decoder
        of, own = d.attention_sizes(attention.layer), not d.shares(attention.layer)
        q, k, v = (f"{attention.name}.{part}" for part in "qkv")
        if len(of) == 1:
            q = qkv
        else:
            kind = "".join(f".{size}" for size in of.values()) if d.block_heads else ""
            sizes, parts = g.numbers(f"qkv_sizes{kind}", *of.values()), [f"{attention.name}.{part}" for part in of]
            g.node("Split", [qkv, sizes], f"{attention.name}.split", outputs=parts, axis=-1)
        if norms is not None:
            if norms.rotated_first and attention.rotary is not None:
                q, k = (self._rotated(x, n, attention.rotary) for x, n in ((q, d.heads), (k, d.kv_heads)))
            q = self._part_norm(q, attention, norms.q)
            k = self._part_norm(k, attention, norms.k) if own else k
        if attention.grows:
            q = g.node("Mul", [q, self._growth()], f"{q}_grown")
        if not own:
            heads = d.heads_of(attention.layer)
            width = heads.kv_heads * heads.head_dim
            none = g.tensor(f"no_keys.{width}", np.empty((1, 0, width), np.float32))
            return [q, none, none]
        return [q, k, self._value_norm(v, attention.layer) if attention.value_norms else v]

    def _part_norm(self, x: str, attention: Attention, norm: Norm) -> str:
        assert attention.head_norms is not None
        return self.norm(x, norm) if attention.head_norms.whole_row else self._head_norm(x, norm, attention.layer)

    def _value_norm(self, v: str, layer: int) -> str:
        """Each head of values over its root mean square."""
        g, size = self.graph, self.decoder.heads_of(layer).head_dim
        split = g.node("Reshape", [v, self._per_head(layer)], f"{v}_heads")
        normed = self._normed(split, g.tensor(f"ones.{size}", np.ones(size, np.float32)), f"{v}_heads_normed")
        return g.node("Reshape", [normed, g.numbers("flat", 0, 0, -1)], f"{v}_normed")

    def _past_tokens(self) -> str:
        """int64 [1]: how many tokens the cache holds."""
        if "past_tokens" not in self.values:
            self.values["past_tokens"] = self.graph.node("Sub", ["total_length", self._tokens()], "past_tokens")
        return self.values["past_tokens"]

    def _rotated(self, x: str, heads: int, kind: str) -> str:
        cos, sin = self._rotary(kind)
        return self.graph.node(
            "RotaryEmbedding", [x, self._past_tokens(), cos, sin], f"{x}_rotated", MS,
            num_heads=heads, rotary_embedding_dim=2 * self.graph.tensors[cos].shape[1],
        )  # fmt: skip

    def _growth(self) -> str:
        """float32 [tokens, 1]: what the queries of each token are multiplied by."""
        g, table = self.graph, self.checkpoint.query_growth()
        assert table is not None
        if "query_growth" not in self.values:
            end = g.node("Add", [self._past_tokens(), self._tokens()], "all_tokens")
            axis = g.numbers("zero_axis", 0)
            rows = [g.tensor("query_growth.table", table[:, None]), self._past_tokens(), end, axis]
            self.values["query_growth"] = g.node("Slice", rows, "query_growth")
        return self.values["query_growth"]

    def _head_norm(self, x: str, norm: Norm, layer: int) -> str:
        per_head, flat = self._per_head(layer), self.graph.numbers("flat", 0, 0, -1)
        split = self.graph.node("Reshape", [x, per_head], f"{x}_heads")
        return self.graph.node("Reshape", [self.norm(split, norm), flat], f"{x}_normed")

    def _per_head(self, layer: int) -> str:
        """The shape [batch, tokens, heads, head_dim]."""
        size = self.decoder.heads_of(layer).head_dim
        return self.graph.numbers("per_head" if size == self.decoder.head_dim else f"per_head.{size}", 0, 0, -1, size)

    def _rotary(self, kind: str) -> list[str]:
        """cos and sin of the layers of one kind."""
        names = [f"{kind}.cos", f"{kind}.sin"]
        if names[0] not in self.graph.tensors:
            for name, values in zip(names, self.checkpoint.rotary(kind), strict=True):
                self.graph.tensor(name, values)
        return names
