"""Experts in an ONNX graph: which ones a token takes, and the sum of their outputs.

A native graph multiplies a token by the rows of its own experts (op ``ExpertsMatMul``).  Stock operators cannot do that
without a loop, which a bundle may not have.  So a portable graph computes all experts of every token, and gives those
that a token does not take the weight 0.  Then the matrices down of all experts act as one matrix of more columns, and
both products are those of any other layer.  It is right, and slow: a token reads all experts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..model.checkpoint import Checkpoint
from .builder import ExpertsStep
from .onnx_graph import Graph


class Chosen(NamedTuple):
    """Names of what ``ExpertNodes.choose`` makes.

    shares: of all experts, [batch, tokens, count]; indices: of the experts that a token takes, int64 [batch, tokens,
    used]; weights: of these, [batch, tokens, used].
    """

    shares: str
    indices: str
    weights: str


class ExpertNodes:
    """Writes the nodes around the products with experts.

    Args:
        graph: where nodes and constants go.
        checkpoint: the model.
    """

    def __init__(self, graph: Graph, checkpoint: Checkpoint) -> None:
        self._graph, self._checkpoint = graph, checkpoint

    def choose(self, experts: ExpertsStep, x: str) -> Chosen:
        """Choose the experts of each token, as ``format.experts.choose_experts`` does.

        Args:
            experts: what scores them.
            x: input of the block, [batch, tokens, hidden].
        """
        g, name, shape = self._graph, experts.name, experts.shape
        chooser, bias = self._checkpoint.chooser(experts.layer)
        scores = g.node("MatMul", [x, g.tensor(f"{name}.chooser", chooser.T)], f"{name}.scores")
        if shape.sigmoid:
            shares = g.node("Sigmoid", [scores], f"{name}.shares")
        else:
            shares = g.node("Softmax", [scores], f"{name}.shares", axis=-1)
        ranks = shares if bias is None else g.node("Add", [shares, g.tensor(f"{name}.bias", bias)], f"{name}.ranks")
        weights, indices = f"{name}.largest", f"{name}.chosen"
        used = g.numbers("experts_used", shape.used)
        g.node("TopK", [ranks, used], f"{name}.top", outputs=[weights, indices], axis=-1)
        if bias is not None:
            weights = g.node("GatherElements", [shares, indices], f"{name}.weights", axis=-1)
        if shape.normed:
            total = g.node("ReduceSum", [weights, g.numbers("last_axis", -1)], f"{name}.sum", keepdims=1)
            if shape.sum_eps:
                total = g.node("Add", [total, _number(g, "expert_sum_eps", shape.sum_eps)], f"{name}.sum_eps")
            weights = g.node("Div", [weights, total], f"{name}.normed")
        if shape.scale != 1:
            weights = g.node("Mul", [weights, _number(g, "expert_scale", shape.scale)], f"{name}.scaled")
        return Chosen(shares, indices, weights)

    def added(self, experts: ExpertsStep, outputs: str, chosen: Chosen) -> str:
        """The sum of the chosen experts' outputs, each times its weight, [batch, tokens, hidden].

        Args:
            experts: which experts.
            outputs: [batch, tokens, used, hidden].
            chosen: by each token.
        """
        weighted = self._weighted(experts, outputs, chosen.weights)
        return self._graph.node(
            "ReduceSum", [weighted, self._graph.numbers("expert_axis", 2)], experts.name, keepdims=0
        )

    def apart(self, experts: ExpertsStep, stacked: str) -> str:
        """Gate and up of each expert, [batch, tokens, count, 2 * ffn].

        Args:
            experts: which experts.
            stacked: [batch, tokens, count * 2 * ffn].
        """
        parts = self._graph.numbers("expert_parts", 0, 0, experts.shape.count, 2 * experts.shape.ffn_size)
        return self._graph.node("Reshape", [stacked, parts], f"{experts.name}.apart")

    def side_by_side(self, experts: ExpertsStep, gated: str, chosen: Chosen) -> str:
        """What all experts have between their layers, times their weights, [batch, tokens, count * ffn].

        Args:
            experts: which experts.
            gated: [batch, tokens, count, ffn].
            chosen: by each token; the others have the weight 0.
        """
        g, name = self._graph, experts.name
        nothing = g.node("Sub", [chosen.shares, chosen.shares], f"{name}.nothing")
        every = g.node("ScatterElements", [nothing, chosen.indices, chosen.weights], f"{name}.every_weight", axis=-1)
        weighted = self._weighted(experts, gated, every)
        return g.node("Reshape", [weighted, g.numbers("flat", 0, 0, -1)], f"{name}.side_by_side")

    def _weighted(self, experts: ExpertsStep, rows: str, weights: str) -> str:
        """[batch, tokens, experts, width] times [batch, tokens, experts]."""
        g, name = self._graph, experts.name
        column = g.node("Reshape", [weights, g.numbers("weight_column", 0, 0, -1, 1)], f"{name}.weight_column")
        return g.node("Mul", [rows, column], f"{name}.weighted")


def _number(graph: Graph, name: str, value: float) -> str:
    return graph.tensor(name, np.array(value, np.float32))
