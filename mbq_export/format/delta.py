"""The gated delta net, the recurrent mixer of Qwen3.5 (arXiv 2412.06464): its definition, token by token.

Each head of values has a memory S, a matrix [key_dim, value_dim], which is zero before the first token.  A token brings
a key k and a query q of length 1, a value v, a decay between 0 and 1 and a strength beta between 0 and 1:

    S    = decay * S
    S    = S + outer(k, beta * (v - k @ S))
    read = q / sqrt(key_dim) @ S

So the memory forgets a little, and then stores the value at the key in place of what it held there.  Queries, keys and
values are convolved over the last tokens before.  What is read is normed and gated behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbq_targets.constants import UNIT_EPS
from mbq_targets.spec import DeltaNet

F64 = NDArray[np.float64]


def delta_net(
    stacked: NDArray[Any],
    shape: DeltaNet,
    weights: Mapping[str, NDArray[Any]],
    states: Mapping[str, NDArray[Any]] | None = None,
    eps: float = 1e-6,
) -> tuple[F64, dict[str, F64]]:
    """What a gated delta net computes between its two linear layers.

    Args:
        stacked: [M, W], the parts of ``DeltaNet.sizes``, before their activations.
        shape: of the net.
        weights: taps [channels, T], the newest token last; rate [value_heads], below 0; step [value_heads];
            gain [value_dim].
        states: what the pass before returned; None for zeros.
        eps: added to the mean square in the norm of what is read.

    Returns:
        float64 [M, value_heads * value_dim], and the states behind the last token: conv [channels, T - 1] and
        recurrent [value_heads, key_dim, value_dim].
    """
    stacked = stacked.astype(np.float64)
    taps, rate, step, gain = (weights[name].astype(np.float64) for name in ("taps", "rate", "step", "gain"))
    before = {name: np.zeros(of) if states is None else states[name] for name, of in shape.states.items()}
    mixed, z, beta, decay = np.split(stacked, np.cumsum([*shape.sizes.values()])[:-1], axis=1)

    seen = np.concatenate([before["conv"].T, mixed])
    convolved = _silu(sum(taps[:, i] * seen[i : i + len(mixed)] for i in range(shape.taps)))
    q, k, v = np.split(convolved, [shape.keys, 2 * shape.keys], axis=1)
    q, k = (_unit(x.reshape(len(x), shape.key_heads, shape.key_dim)) for x in (q, k))
    q, k = (np.repeat(x, shape.value_heads // shape.key_heads, axis=1) for x in (q / np.sqrt(shape.key_dim), k))
    v = v.reshape(len(v), shape.value_heads, shape.value_dim)
    decay, beta = np.exp(rate * np.logaddexp(0, decay + step)), 1 / (1 + np.exp(-beta))

    memory, read = before["recurrent"].astype(np.float64), np.zeros_like(v)
    for t in range(len(v)):
        memory = memory * decay[t, :, None, None]
        found = np.einsum("hkv,hk->hv", memory, k[t])
        memory = memory + k[t, :, :, None] * (beta[t, :, None] * (v[t] - found))[:, None]
        read[t] = np.einsum("hkv,hk->hv", memory, q[t])
    normed = read / np.sqrt((read**2).mean(-1, keepdims=True) + eps) * gain
    return normed.reshape(z.shape) * _silu(z), {"conv": seen[len(mixed) :].T, "recurrent": memory}


def _silu(x: Any) -> F64:
    return np.asarray(x / (1 + np.exp(-x)), np.float64)


def _unit(x: F64) -> F64:
    """Each vector along the last axis, divided by its length."""
    return np.asarray(x / np.sqrt((x**2).sum(-1, keepdims=True) + UNIT_EPS))
