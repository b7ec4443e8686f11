"""The nodes of a gated delta net in an ONNX graph: what comes between its two linear layers.

All but the norms of queries and keys are operators of ONNX Runtime.  ``format.delta`` defines what they compute.
"""

from __future__ import annotations

import numpy as np

from mbq_targets.constants import UNIT_EPS

from ..model.checkpoint import Checkpoint
from .builder import Delta
from .onnx_attention import MS
from .onnx_graph import Graph


def delta_nodes(graph: Graph, checkpoint: Checkpoint, delta: Delta, stacked: str) -> str:
    """Write a gated delta net, with the states that it keeps from pass to pass.

    Args:
        graph: where nodes and constants go.
        checkpoint: the model.
        delta: which net.
        stacked: its projections, see ``Decoder.parts``.

    Returns:
        What was read from the memories, normed and gated.
    """
    g, name, layer, shape = graph, delta.name, delta.layer, delta.shape
    weights, parts = checkpoint.delta_weights(layer), [f"{name}.{part}" for part in shape.sizes]
    g.node("Split", [stacked, g.numbers("delta_sizes", *shape.sizes.values())], f"{name}.split", outputs=parts, axis=-1)
    mixed, z, beta, decay = parts

    channels = g.node("Transpose", [mixed], f"{name}.channels", perm=[0, 2, 1])
    g.node(
        "CausalConvWithState",
        [channels, g.tensor(f"{name}.taps", weights.taps[:, None]), "", f"past.{layer}.conv"],
        f"{name}.convolved", MS, outputs=[f"{name}.convolved", f"present.{layer}.conv"], ndim=1, activation="silu",
    )  # fmt: skip
    tokens = g.node("Transpose", [f"{name}.convolved"], f"{name}.tokens", perm=[0, 2, 1])
    qkv, widths = [f"{name}.{part}" for part in "qkv"], g.numbers("delta_qkv", shape.keys, shape.keys, shape.values)
    g.node("Split", [tokens, widths], f"{name}.qkv", outputs=qkv, axis=-1)
    # A query of length 1 is divided by the root of its width once more.
    q, k = (_unit_heads(g, x, delta, power) for x, power in ((qkv[0], 1.0), (qkv[1], 0.5)))

    rates = [g.tensor(f"{name}.{part}", value) for part, value in (("step", weights.step), ("rate", weights.rate))]
    gates = [f"{name}.log_decay", f"{name}.strength"]
    g.node("LinearAttentionGate", [decay, *rates, beta], f"{name}.gates", MS, outputs=gates)
    g.node(
        "LinearAttention",
        [q, k, qkv[2], f"past.{layer}.recurrent", *gates],
        f"{name}.read", MS, outputs=[f"{name}.read", f"present.{layer}.recurrent"],
        q_num_heads=shape.key_heads, kv_num_heads=shape.value_heads, update_rule="gated_delta", scale=1.0,
    )  # fmt: skip
    gain = g.tensor(f"{name}.gain", weights.gain)
    return g.node(
        "GatedRMSNorm", [f"{name}.read", gain, z], name, MS, epsilon=checkpoint.decoder.norm_eps, activation="silu"
    )


def _unit_heads(g: Graph, x: str, delta: Delta, power: float) -> str:
    """Each head of queries or keys, divided by its length and by ``width ** (power - 0.5)``.

    An RMS norm divides by the root of the mean square, so its gain makes the length.
    """
    width = delta.shape.key_dim
    gain = g.tensor(f"delta_unit.{power:g}", np.full(width, width**-power, np.float32))
    heads = g.node("Reshape", [x, g.numbers("delta_heads", 0, 0, -1, width)], f"{x}_heads")
    normed = g.node(
        "SimplifiedLayerNormalization", [heads, gain], f"{x}_unit", axis=-1, epsilon=UNIT_EPS / width, stash_type=1
    )
    return g.node("Reshape", [normed, g.numbers("flat", 0, 0, -1)], f"{x}_normed")
