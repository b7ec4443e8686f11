"""The steps of a decoder, and the ``Builder``: one engine's way to write each of them.

``decoder`` says in which order the steps come, and makes the description of each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from mbq_targets.spec import DeltaNet, Experts

from ..calibrated import HeadInput, RoutedLinear
from ..format.codes import Sliced

V = TypeVar("V")
"""How a builder refers to an activation: a name in a graph, a variable, a buffer."""


@dataclass(frozen=True)
class Embedding:
    """The table that tokens are looked up in, at full depth or the deepest one of the pass.

    name: first part of its tensors' names, "head" for a tied table; table: its slices, [vocab, width];
    factors: float32 [width], multiply each row that is read; None for none; rows: name of what is read.
    """

    name: str
    table: Sliced
    factors: NDArray[np.float32] | None
    rows: str = "embedding"


@dataclass(frozen=True)
class Norm:
    """One RMS norm.

    name: in a graph, such as "layers.0.attn_norm"; source: its name in the checkpoint.
    """

    name: str
    source: str


@dataclass(frozen=True)
class HeadNorms:
    """The norms of q and of k.

    q, k: the norms; whole_row: each is over all heads together, not over one; rotated_first: they come behind the
    rotation, not before it.
    """

    q: Norm
    k: Norm
    whole_row: bool
    rotated_first: bool


@dataclass(frozen=True)
class Attention:
    """What one layer's attention computes between its two linear layers.

    name: in a graph; layer: index of the block, whose heads are ``Decoder.heads_of``; rotary: kind of its table of
    rotations, as ``Checkpoint.rotary`` takes it, None for no rotation; window: tokens that a token sees, itself
    included, None for all; scale: multiplies q . k; head_norms: norms of q and of k, None for none; cap: soft cap of
    the scores, None for none; grows: whether queries are multiplied by ``Checkpoint.query_growth``; gates: how many
    numbers the projection has behind v for each head, whose sigmoids multiply what the head attends to: 0, 1, or one
    for each channel; value_norms: whether each head of values goes through an RMS norm that multiplies by 1.
    """

    name: str
    layer: int
    rotary: str | None
    window: int | None
    scale: float
    head_norms: HeadNorms | None
    cap: float | None = None
    grows: bool = False
    gates: int = 0
    value_norms: bool = False


@dataclass(frozen=True)
class Delta:
    """What a gated delta net computes between its two linear layers (``format.delta``).

    name: in a graph; layer: index of the block; shape: heads, channels and taps.
    """

    name: str
    layer: int
    shape: DeltaNet


@dataclass(frozen=True)
class Convolution:
    """What a short convolution computes between its two linear layers: ``c * convolved(b * x)``, channel by channel.

    name: in a graph; layer: index of the block; source: the module of the taps in the checkpoint.
    """

    name: str
    layer: int
    source: str


@dataclass(frozen=True)
class Gate:
    """What an MLP computes between its two linear layers: ``activation(gate) * up``.

    name: in a graph; activation: a value of ``families.ACTIVATIONS``.
    """

    name: str
    activation: str


@dataclass(frozen=True)
class ExpertsStep:
    """What a block's experts compute (``format.experts``).

    name: in a graph; layer: index of the block; shape: of the experts; activation: of their gates, a value of
    ``families.ACTIVATIONS``.
    """

    name: str
    layer: int
    shape: Experts
    activation: str


@dataclass(frozen=True)
class PerLayer:
    """What a block does with its part of the per-layer embeddings (``format.per_layer``).

    name: in a graph; layer: index of the block; norm: of what the embedding gives; activation: a value of
    ``families.ACTIVATIONS``.
    """

    name: str
    layer: int
    norm: Norm
    activation: str


class Builder(ABC, Generic[V]):
    """One engine's way to write each step of the walk.

    Activations are float32 [tokens, width].  A builder may write fewer tokens where only the last are needed.
    """

    @abstractmethod
    def embed(self, embedding: Embedding) -> V:
        """Look up the tokens of the pass.

        Args:
            embedding: table and factors.

        Returns:
            The residual stream, [tokens, hidden].
        """

    @abstractmethod
    def norm(self, residual: V, branch: V | None, norm: Norm, feeds: RoutedLinear) -> tuple[V, V]:
        """Add a branch to the residual stream and norm the sum.

        Args:
            residual: stream, [tokens, hidden].
            branch: what the last attention or MLP adds to it, [tokens, hidden]; None before the first.
            norm: which norm.
            feeds: the linear layer that reads the result.

        Returns:
            The normed sum and the sum, each [tokens, hidden].
        """

    @abstractmethod
    def add(self, residual: V, branch: V | None, name: str, feeds: RoutedLinear) -> tuple[V, V]:
        """Add a branch to the residual stream, which the next linear layer reads without a norm.

        Args:
            residual: stream, [tokens, hidden].
            branch: what the last attention or MLP adds to it, [tokens, hidden]; None before the first.
            name: of the sum in a graph.
            feeds: the linear layer that reads the sum.

        Returns:
            The sum as the layer reads it, and the sum as the stream, each [tokens, hidden].
        """

    @abstractmethod
    def post_norm(self, branch: V, norm: Norm) -> V:
        """Norm what attention or MLP puts out, before it is added to the stream.

        Args:
            branch: output of the block, [tokens, hidden].
            norm: which norm.

        Returns:
            The normed branch, [tokens, hidden].
        """

    @abstractmethod
    def linear(self, linear: RoutedLinear, x: V, routed_by: V) -> V:
        """Choose each token's depth and multiply by the slices up to it; then add the bias, if there is one.

        Args:
            linear: slices, router and bias of the layer, [N, K].
            x: input, [tokens, K].
            routed_by: what the router reads, [tokens, K]: the stream behind a norm, or ``x``.

        Returns:
            The product, [tokens, N].
        """

    @abstractmethod
    def attention(self, attention: Attention, qkv: V, feeds: RoutedLinear) -> V:
        """Rotate q and k, put k and v into the cache, attend.

        Args:
            attention: what this layer's attention does.
            qkv: queries, keys and values, [tokens, (heads + 2 * kv_heads) * head_dim], then gates,
                [tokens, heads * gates].
            feeds: the linear layer that reads the result.

        Returns:
            Attended values, [tokens, heads * head_dim].
        """

    @abstractmethod
    def convolution(self, convolution: Convolution, stacked: V, feeds: RoutedLinear) -> V:
        """Multiply b and x, convolve each channel over the last tokens, multiply by c.

        Args:
            convolution: which taps.
            stacked: b, then c, then x, [tokens, 3 * hidden].
            feeds: the linear layer that reads the result.

        Returns:
            The product, [tokens, hidden].
        """

    @abstractmethod
    def delta(self, delta: Delta, stacked: V, feeds: RoutedLinear) -> V:
        """Convolve queries, keys and values, write the values into the memories and read them, norm and gate.

        Args:
            delta: shape of the net.
            stacked: queries, keys and values, then z, the strengths and the decays, see ``Decoder.parts``.
            feeds: the linear layer that reads the result.

        Returns:
            What was read, [tokens, value_heads * value_dim].
        """

    @abstractmethod
    def gate(self, gate: Gate, stacked: V, feeds: RoutedLinear) -> V:
        """Multiply the activated gate by the up projection.

        Args:
            gate: which activation.
            stacked: gate, then up, [tokens, 2 * ffn].
            feeds: the linear layer that reads the result.

        Returns:
            The product, [tokens, ffn].
        """

    @abstractmethod
    def experts(self, experts: ExpertsStep, layers: tuple[RoutedLinear, RoutedLinear], x: V, routed_by: V) -> V:
        """Choose the experts of each token, and add up their outputs.

        Args:
            experts: what scores them, their number, their activation.
            layers: gate and up of each expert, [experts * 2 * ffn, hidden]; down of each, [experts * hidden, ffn].
            x: input of the block, [tokens, hidden].
            routed_by: what both routers read, [tokens, hidden].

        Returns:
            The sum, [tokens, hidden].
        """

    @abstractmethod
    def per_layer(self, per_layer: PerLayer, gate: V, given: V, rows: V) -> V:
        """Add a block's part of the per-layer embeddings to what the embedding gives it, and gate the sum.

        Args:
            per_layer: which block, norm and activation.
            gate: gate before its activation, [tokens, size].
            given: what the embedding gives, before its norm, [tokens, size].
            rows: result of ``embed`` for the table of per-layer embeddings, [tokens, layers * size].

        Returns:
            ``activation(gate) * (norm(given) + part of rows)``, [tokens, size].
        """

    @abstractmethod
    def scale(self, residual: V, branch: V, name: str, source: str) -> V:
        """Add a branch to the residual stream, and multiply the sum by a scalar of the checkpoint.

        Args:
            residual: stream, [tokens, hidden].
            branch: what the last branch of the block adds to it, [tokens, hidden].
            name: of the result in a graph.
            source: name of the scalar in the checkpoint.

        Returns:
            The stream, [tokens, hidden].
        """

    @abstractmethod
    def final_norm(self, residual: V, branch: V | None, norm: Norm, feeds: RoutedLinear) -> tuple[V, V]:
        """As ``norm``, before the head.  Only tokens whose logits are wanted need it.

        Args:
            residual: stream, [tokens, hidden].
            branch: what the last MLP adds to it, [tokens, hidden].
            norm: which norm.
            feeds: the head.

        Returns:
            The normed sum and the sum.
        """

    @abstractmethod
    def head_input(self, turn: HeadInput, x: V) -> V:
        """Turn the input of a tied head back to the embedding's channels: ``x @ kron.T * gain @ kron``.

        Args:
            turn: the two factors of ``kron``, and ``gain``.
            x: result of ``final_norm``, [tokens, hidden].

        Returns:
            The turned input, [tokens, hidden].
        """

    @abstractmethod
    def logits(self, head: RoutedLinear, x: V, routed_by: V) -> V:
        """Multiply by the head, as ``linear`` does, and make the result an output of the pass.

        Args:
            head: slices and router of the head, [vocab, hidden].
            x: input of the head, [tokens, hidden].
            routed_by: what the router reads: the stream behind the final norm, [tokens, hidden].

        Returns:
            Logits, [tokens, vocab], with the soft cap of ``Decoder.logits_cap``.
        """
