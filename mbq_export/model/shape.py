"""The shape of one decoder: what calibration and the lowerings read of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

from mbq_runtime.bundle.facts import BlockHeads
from mbq_runtime.bundle.layout import kv_row_bytes
from mbq_targets.spec import DeltaNet, Experts

from .families import Family, Norms

FULL, SLIDING, CONV, DELTA = "full_attention", "sliding_attention", "conv", "linear_attention"
"""Kinds of layers, by their names in config.json: attention to all tokens, to a window, a short convolution, and a
gated delta net."""

_MIXERS = {CONV: "conv", DELTA: "delta"}


@dataclass(frozen=True)
class Unit:
    """Linear layers that share one input, and so one router and one sliced matmul.

    name: as in the graph and in the manifest; sources: the layers' names in the checkpoint, in the order in which their
    weights are stacked along N; experts: of which each token takes some, or None.
    """

    name: str
    sources: tuple[str, ...]
    experts: Experts | None = None

    def read_of(self, weights: int) -> int:
        """How many of the unit's weights a token reads: of experts those that it takes.

        Args:
            weights: all weights of the unit.
        """
        return weights if self.experts is None else weights * self.experts.used // self.experts.count


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of the weight and the bias of a linear layer.

    layer: the layer's name in the checkpoint; start, stop: row indices.
    """

    layer: str
    start: int
    stop: int


@dataclass(frozen=True)
class QueryGrowth:
    """A factor of the queries that grows with the position: ``1 + beta * log(1 + floor(position / original))``.

    beta: of the logarithm; original: tokens of context from which on the factor is above 1.
    """

    beta: float
    original: int


@dataclass(frozen=True)
class Decoder:
    """The shape of one model, in the units of its config.

    family: its row of ``FAMILIES``; layers: number of blocks; hidden_size: width of the residual stream;
    ffn_size: width of the MLP; heads: query heads; kv_heads: heads of keys and values; head_dim: channels in a head;
    vocab_size: number of tokens in the vocabulary; context_length: most tokens in a context;
    norm_eps: added to the mean square in RMS norms.
    """

    family: Family
    layers: int
    hidden_size: int
    ffn_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    norm_eps: float
    tied: bool
    """Whether the head is the embedding."""
    activation: str
    """A value of ``describe.ACTIVATIONS``."""
    attention_scale: float
    """Multiplies q . k."""
    layer_kinds: tuple[str, ...]
    """FULL, SLIDING, CONV or DELTA, by layer."""
    sliding_window: int
    """Tokens that a token attends to in sliding layers, itself included."""
    embedding_scale: float = 1.0
    """What a row of the embedding is multiplied by."""
    rotates: tuple[bool, ...] | None = None
    """Whether q and k are rotated, by layer.  None: in all."""
    attention_cap: float | None = None
    """Soft cap of the scores: ``cap * tanh(score / cap)``."""
    logits_cap: float | None = None
    """Soft cap of the logits."""
    query_growth: QueryGrowth | None = None
    """How queries grow with their position."""
    conv_taps: int = 0
    """Tokens that a convolution sees, the newest included."""
    delta: DeltaNet | None = None
    """The shape of all gated delta nets.  None: there are none."""
    branch_scale: float = 1.0
    """What attention and MLP put out is multiplied by.  Folded into weights when the model is loaded."""
    logits_scale: float = 1.0
    """What logits are multiplied by.  Folded into the final norm when the model is loaded."""
    experts: Experts | None = None
    """The experts of all blocks that have some.  None: there are none."""
    block_heads: tuple[BlockHeads, ...] = ()
    """Heads of keys and values by block.  Empty: all have ``kv_heads`` of ``head_dim``, and none shares those of an
    earlier block."""
    ffn_sizes: tuple[int, ...] = ()
    """Width of the MLP by block.  Empty: all have ``ffn_size``."""
    per_layer_size: int = 0
    """Numbers that a token has in a table for each block, beside its embedding.  0: there is no such table."""
    rotated: tuple[int, ...] = ()
    """Channels of a head that are rotated, of each table of rotations that turns a part of a head."""

    def mixer(self, layer: int) -> str:
        """What mixes tokens in a block: attn, conv or delta, the first part of its roles.

        Args:
            layer: index of the block.
        """
        return _MIXERS.get(self.layer_kinds[layer], "attn")

    def branches(self, layer: int) -> tuple[str, ...]:
        """The parts of a block, in order, by the first part of their roles: its mixer; mlp or experts, or both; and ple
        for per-layer embeddings.

        Args:
            layer: index of the block.
        """
        experts = self.experts is not None and self.experts.blocks[layer]
        of_token = ("mlp", "experts") if experts and self._beside else ("experts" if experts else "mlp",)
        return (self.mixer(layer), *of_token, *(("ple",) if self.per_layer_size else ()))

    def readers(self, layer: int) -> tuple[str, ...]:
        """The parts of a block that read the residual stream behind the part before.

        Experts beside an MLP read what the MLP reads.

        Args:
            layer: index of the block.
        """
        return tuple(part for part in self.branches(layer) if part != "experts" or not self._beside)

    @property
    def _beside(self) -> Norms | None:
        """Norms of blocks with experts beside an MLP; None where experts stand in its place."""
        return None if self.family.experts is None else self.family.experts.beside

    def layers_of(self, role: str) -> int:
        """How many blocks have a unit of this role.

        Args:
            role: such as attn_in.
        """
        branch = role.partition("_")[0]
        return sum(branch in self.branches(layer) for layer in range(self.layers))

    def heads_of(self, layer: int) -> BlockHeads:
        """The heads of keys and values of a block with attention.

        Args:
            layer: index of the block.
        """
        return self.block_heads[layer] if self.block_heads else BlockHeads(layer, self.kv_heads, self.head_dim)

    def shares(self, layer: int) -> bool:
        """Whether a block attends to the keys and values of an earlier block, and has none of its own.

        Args:
            layer: index of a block with attention.
        """
        return self.heads_of(layer).source != layer

    @property
    def some_share(self) -> bool:
        """Whether a block shares the keys and values of an earlier one."""
        return any(of.source != layer for layer, of in enumerate(self.block_heads))

    @property
    def caches(self) -> dict[int, BlockHeads]:
        """The heads of the blocks that have keys and values of their own, by index of the block."""
        attending = (layer for layer in range(self.layers) if self.mixer(layer) == "attn")
        return {layer: self.heads_of(layer) for layer in attending if not self.shares(layer)}

    def ffn_size_of(self, layer: int) -> int:
        """Width of the MLP of a block.

        Args:
            layer: index of the block.
        """
        return self.ffn_sizes[layer] if self.ffn_sizes else self.ffn_size

    def attention_sizes(self, layer: int) -> dict[str, int]:
        """Rows of q, k and v in the stacked projection, and of gates (g) where the family has them.

        In this order engines take them.  A checkpoint with ``channel_gates`` has the gates among the rows of q.

        Args:
            layer: index of a block with attention.
        """
        of = self.heads_of(layer)
        sizes = {"q": self.heads * of.head_dim}
        if not self.shares(layer):
            sizes |= dict.fromkeys("kv", of.kv_heads * of.head_dim)
        return {**sizes, "g": self.heads * self.head_gates} if self.head_gates else sizes

    @property
    def head_gates(self) -> int:
        """Numbers that gate what a head attends to: 0 for no gates, 1, or one for each channel."""
        return self.head_dim if self.family.channel_gates else int(self.family.head_gates)

    def parts(self, layer: int) -> dict[str, dict[str, slice]]:
        """By role, the rows of each part in the stacked matrix of a block, in the order of the checkpoint.

        Parts are q, k, v, g and o of attention; gate, up and down of an MLP; b, c, x and y of a convolution; and mixed
        (queries, keys and values), z, beta, decay and out of a delta net.

        Args:
            layer: index of the block.
        """
        delta, attention, ffn_size = self.delta, self.attention_sizes(layer), self.ffn_size_of(layer)
        if self.family.channel_gates:
            attention = {"q": attention["q"] + attention["g"], "k": attention["k"], "v": attention["v"]}
        sizes = {
            "attn_in": attention,
            "attn_out": {"o": self.hidden_size},
            "conv_in": dict.fromkeys("bcx", self.hidden_size),
            "conv_out": {"y": self.hidden_size},
            "delta_in": {} if delta is None else delta.sizes,
            "delta_out": {"out": self.hidden_size},
            "mlp_in": {"gate": ffn_size, "up": ffn_size},
            "mlp_out": {"down": self.hidden_size},
        }
        return {role: dict(zip(of, stacked(*of.values()), strict=True)) for role, of in sizes.items()}

    def shapes(self, layer: int) -> dict[str, tuple[int, int]]:
        """(N, K) of the stacked matrix of each unit of a block, by role.

        Args:
            layer: index of the block.
        """
        attended, delta = self.heads * self.heads_of(layer).head_dim, self.delta
        experts, expert_size = (0, 0) if self.experts is None else (self.experts.count, self.experts.ffn_size)
        shapes = {
            "attn_in": (sum(self.attention_sizes(layer).values()), self.hidden_size),
            "attn_out": (self.hidden_size, attended),
            "conv_in": (3 * self.hidden_size, self.hidden_size),
            "conv_out": (self.hidden_size, self.hidden_size),
            "delta_in": (0 if delta is None else sum(delta.sizes.values()), self.hidden_size),
            "delta_out": (self.hidden_size, 0 if delta is None else delta.values),
            "mlp_in": (2 * self.ffn_size_of(layer), self.hidden_size),
            "mlp_out": (self.hidden_size, self.ffn_size_of(layer)),
            "experts_in": (experts * 2 * expert_size, self.hidden_size),
            "experts_out": (experts * self.hidden_size, expert_size),
            "ple_embed": (self.per_layer_size, self.hidden_size),
            "ple_in": (self.per_layer_size, self.hidden_size),
            "ple_out": (self.hidden_size, self.per_layer_size),
        }
        return {role: shapes[role] for role in self.layer_units(layer)}

    @property
    def role_shapes(self) -> dict[str, tuple[int, int]]:
        """(N, K) of the largest stacked matrix of each role, for the roles that occur."""
        return {role: max(of, key=prod) for role, of in self._shapes_by_role().items()}

    @property
    def shape_counts(self) -> dict[tuple[str, tuple[int, int]], int]:
        """How many blocks have a unit of a role and an (N, K)."""
        return {(role, shape): of.count(shape) for role, of in self._shapes_by_role().items() for shape in of}

    def _shapes_by_role(self) -> dict[str, list[tuple[int, int]]]:
        found: dict[str, list[tuple[int, int]]] = {}
        for layer in range(self.layers):
            for role, shape in self.shapes(layer).items():
                found.setdefault(role, []).append(shape)
        return found

    def unit_shapes(self) -> dict[str, tuple[int, int]]:
        """(N, K) of every unit by name, in the order of ``units``."""
        shapes = {
            unit.name: shape
            for layer in range(self.layers)
            for unit, shape in zip(self.layer_units(layer).values(), self.shapes(layer).values(), strict=True)
        }
        return {**shapes, self.head.name: (self.vocab_size, self.hidden_size)}

    def read_shapes(self) -> dict[str, tuple[int, int]]:
        """(N, K) of what a token reads of every unit, in the order of ``units``: of experts those that it takes."""
        shapes = self.unit_shapes()
        return {unit.name: (unit.read_of(shapes[unit.name][0]), shapes[unit.name][1]) for unit in self.units()}

    @property
    def token_counts(self) -> dict[tuple[str, tuple[int, int]], int]:
        """How many blocks have a unit of a role and the (outputs, inputs) that a token has in the unit's layers."""
        return {(role, self.of_token(role, shape)): count for (role, shape), count in self.shape_counts.items()}

    def of_token(self, role: str, shape: tuple[int, int]) -> tuple[int, int]:
        """(outputs, inputs) that a token has in the layers of a unit.

        Each expert that a token takes has a copy of its input.

        Args:
            role: of the unit.
            shape: (N, K) of its stacked matrix.
        """
        if self.experts is None or not role.startswith("experts"):
            return shape
        used, size = self.experts.used, self.experts.ffn_size
        if role == "experts_in":
            return 2 * used * size, used * self.hidden_size
        return used * self.hidden_size, used * size

    def router_widths(self) -> dict[str, int]:
        """Numbers that each unit's router looks at, by unit name: see ``model.router_inputs``."""
        widths = {name: k for name, (_, k) in self.unit_shapes().items()}
        return widths | {unit.name: self.hidden_size for unit in self.units() if unit.experts is not None}

    @property
    def per_layer_width(self) -> int:
        """Width of a row of the table of per-layer embeddings, of all blocks together; 0 for no table."""
        return self.layers * self.per_layer_size

    @property
    def per_layer_scale(self) -> float:
        """What a row of the table of per-layer embeddings is multiplied by.

        Gemma 4 multiplies by ``sqrt(size)``, and the sum of the row and of what the embedding gives by ``sqrt(1 / 2)``.
        """
        return math.sqrt(self.per_layer_size / 2)

    @property
    def parameters(self) -> int:
        """Number of weights: those of all units, the embedding where it is not the head, and per-layer embeddings.

        Norms do not count.
        """
        of_units = sum(count * prod(shape) for (_, shape), count in self.shape_counts.items())
        tables = (1 if self.tied else 2) * self.hidden_size + self.per_layer_width
        return of_units + tables * self.vocab_size

    def token_bytes(self, kv_bits: int) -> int:
        """Bytes of the keys and values of one token, which an engine keeps.

        Args:
            kv_bits: bits of each: 32 for float32, or 8.
        """
        return 2 * sum(of.kv_heads * kv_row_bytes(of.head_dim, kv_bits) for of in self.caches.values())

    @property
    def carried_size(self) -> int:
        """Numbers of each token that calibration keeps between blocks: the stream, and what later blocks share."""
        sources = {self.heads_of(layer).source for layer in range(self.layers) if self.shares(layer)}
        of_sources = (self.heads_of(layer) for layer in sources)
        return self.hidden_size + 2 * sum(of.kv_heads * of.head_dim for of in of_sources)

    @property
    def chooser_bytes(self) -> int:
        """Bytes of the float32 weights that score experts.  They are not sliced: a token reads all of them."""
        return 0 if self.experts is None else 4 * self.layers_of("experts_in") * self.experts.count * self.hidden_size

    @property
    def state_bytes(self) -> int:
        """Bytes of the float32 states of one context, whatever its length."""
        numbers = self.layers_of("conv_in") * self.hidden_size * (self.conv_taps - 1)
        if self.delta is not None:
            numbers += self.layers_of("delta_in") * sum(map(prod, self.delta.states.values()))
        return 4 * numbers

    def block(self, layer: int) -> str:
        """The name of a block's module.

        Args:
            layer: index of the block.
        """
        return f"model.layers.{layer}"

    def layer_units(self, layer: int) -> dict[str, Unit]:
        """The units of one block, by role.

        Args:
            layer: index of the block.
        """
        parts = self.branches(layer)
        units = {}
        for role, names in self.family.linears.items():
            if role.startswith(parts):
                # A block that shares keys and values has queries alone.
                own = names[:1] if role == "attn_in" and self.shares(layer) else names
                units[role] = Unit(f"layers.{layer}.{role}", tuple(f"{self.block(layer)}.{name}" for name in own))
        if "experts" not in parts:
            return units
        gate, up, down = self.expert_layers(layer)
        both = tuple(name for of_one in zip(gate, up, strict=True) for name in of_one)
        for role, names in (("experts_in", both), ("experts_out", down)):
            units[role] = Unit(f"layers.{layer}.{role}", names, self.experts)
        return units

    def expert_layers(self, layer: int) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """The names of gate, of up and of down of each expert.

        Args:
            layer: index of a block with experts.
        """
        assert self.experts is not None
        assert self.family.experts is not None
        first = f"{self.block(layer)}.{self.family.experts.experts}"
        gate, up, down = (
            tuple(f"{first}.{at}.{name}" for at in range(self.experts.count)) for name in self.family.experts.layers
        )
        return gate, up, down

    def expert_bias(self, layer: int) -> str | None:
        """The name of what is added to the shares of a block's experts to choose some, or None for nothing.

        Args:
            layer: index of a block with experts.
        """
        names = self.family.experts
        if names is None or names.bias is None or self.experts is None or not self.experts.biased:
            return None
        return f"{self.block(layer)}.{names.bias}"

    def chooser(self, layer: int) -> str | None:
        """The name of the module that scores a block's experts, or None where the block has none.

        Args:
            layer: index of the block.
        """
        if self.family.experts is None or "experts" not in self.branches(layer):
            return None
        return f"{self.block(layer)}.{self.family.experts.chooser}"

    @property
    def head(self) -> Unit:
        """The unit that makes logits."""
        return Unit("head", ("lm_head",))

    def units(self) -> Iterator[Unit]:
        """All units in the order in which the graph runs them."""
        for layer in range(self.layers):
            yield from self.layer_units(layer).values()
        yield self.head

    def input_norm(self, layer: int, role: str) -> str | None:
        """The name of the norm that makes a unit's input, or None where the unit reads the residual stream itself.

        Args:
            layer: index of the block.
            role: attn_in, conv_in, delta_in, mlp_in, experts_in or ple_in.
        """
        return self._norm(layer, role)

    def normed_units(self, layer: int) -> dict[str, tuple[str, Unit]]:
        """The norm before each unit that has one, and the unit, by role.

        Args:
            layer: index of the block.
        """
        units = self.layer_units(layer)
        norms = {role: self.input_norm(layer, role) for role in (f"{part}_in" for part in self.branches(layer))}
        return {role: (norm, units[role]) for role, norm in norms.items() if norm is not None}

    def norm_readers(self, layer: int) -> dict[str, tuple[str, ...]]:
        """The modules whose weights multiply what a norm puts out, by the norm's name: for all norms before units.

        Args:
            layer: index of the block.
        """
        chooser = self.chooser(layer)
        return {
            norm: unit.sources if unit.experts is None or chooser is None else (*unit.sources, chooser)
            for norm, unit in self.normed_units(layer).values()
        }

    def output_norm(self, layer: int, role: str) -> str | None:
        """The name of the norm that a unit's output goes through, or None where the family has no such norm.

        Args:
            layer: index of the block.
            role: attn_out, conv_out, delta_out, mlp_out, experts_out or ple_out; both_out for the sum of an MLP and
                the experts beside it.
        """
        return self._norm(layer, role)

    def _norm(self, layer: int, role: str) -> str | None:
        norms = self.family.norms
        if self._beside is not None and "experts" in self.branches(layer):
            norms = {**norms, **self._beside}
        # Experts in the place of an MLP have its norms.
        name = norms.get(role) or norms.get(role.replace("experts", "mlp"))
        return None if name is None else f"{self.block(layer)}.{name}"

    @property
    def turns(self) -> bool:
        """Whether the residual stream can be rotated: no norm is on what a block adds to it."""
        return not any(role.endswith("_out") for role in self.family.norms)

    @property
    def final_norm(self) -> str:
        """The name of the norm that makes the head's input."""
        return self.family.final_norm

    def convolution(self, layer: int) -> str:
        """The name of the module with a convolution's taps.

        Args:
            layer: index of a block with a convolution or a delta net.
        """
        return f"{self.block(layer)}.conv.conv" if self.mixer(layer) == "conv" else f"{self.delta_net(layer)}.conv1d"

    def delta_net(self, layer: int) -> str:
        """The name of the module of a gated delta net.

        Args:
            layer: index of the block.
        """
        return f"{self.block(layer)}.linear_attn"

    def layer_scalar(self, layer: int) -> str | None:
        """The name of what the residual stream behind a block is multiplied by, or None for nothing.

        Args:
            layer: index of the block.
        """
        return f"{self.block(layer)}.layer_scalar" if self.family.layer_scalars else None

    def head_norms(self, layer: int) -> tuple[str, str] | None:
        """The names of the norms of q and of the keys that it attends to, or None where the block has none.

        Args:
            layer: index of the block.
        """
        norms = self.family.head_norms if self.mixer(layer) == "attn" else None
        if norms is None:
            return None
        return f"{self.block(layer)}.{norms.q}", f"{self.block(self.heads_of(layer).source)}.{norms.k}"

    def rows(self, layer: int, part: str) -> Rows:
        """Where a part of a block is in the checkpoint.

        Args:
            layer: index of the block.
            part: as ``parts`` names it.
        """
        parts = self.parts(layer)
        role = next(role for role, of in parts.items() if part in of)
        within, names = parts[role][part], self.layer_units(layer)[role].sources
        if len(names) == 1:
            return Rows(names[0], within.start, within.stop)
        return Rows(names[list(parts[role]).index(part)], 0, within.stop - within.start)

    def rotary_kind(self, layer: int) -> str | None:
        """The kind of rotation of a block, or None for no rotation.  Blocks of one kind use the same frequencies.

        Args:
            layer: index of the block.
        """
        if self.mixer(layer) != "attn" or (self.rotates is not None and not self.rotates[layer]):
            return None
        return self.layer_kinds[layer] if self.family.local_rotary else FULL

    @property
    def rotary_kinds(self) -> list[str]:
        """The kinds of rotation that occur, in the order of their first layers."""
        kinds = (self.rotary_kind(layer) for layer in range(self.layers))
        return [kind for kind in dict.fromkeys(kinds) if kind is not None]

    def window(self, layer: int) -> int | None:
        """How many tokens a token attends to in a block, itself included, or None for all.

        Args:
            layer: index of the block.
        """
        sliding = self.layer_kinds[layer] == SLIDING and self.sliding_window < self.context_length
        return self.sliding_window if sliding else None


def stacked(*sizes: int) -> list[slice]:
    """The places of parts that are stacked one after the other.

    Args:
        sizes: number of rows of each part.
    """
    return [slice(start, stop) for start, stop in pairwise(accumulate(sizes, initial=0))]
