"""The parts of a manifest that tell of the model, the machine, the routers and the quality."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import UsageError

GROUP_SIZES = (32, 64, 128)
ACTIVATION_BITS = (8, 16)
KV_BITS = (8, 32)
ARCHITECTURES = ("aarch64", "x86_64", "any")
STATES = {"conv": 2, "recurrent": 3}
"""States of a block with a delta net, by name, and their dimensions: the last tokens before their convolution,
[channels, tokens], and the memories of its heads, [heads, key_dim, value_dim]."""


@dataclass(frozen=True)
class BlockHeads:
    """The heads of a block with attention.

    source: the block whose keys and values it attends to: itself, or an earlier one.
    kv_heads: heads of keys, and of values.
    head_dim: channels of a head.
    """

    source: int
    kv_heads: int
    head_dim: int


def by_shape(heads: Mapping[int, BlockHeads]) -> dict[tuple[int, int], list[int]]:
    """The blocks whose keys and values an engine holds in one array: those with heads of one shape.

    Args:
        heads: of the blocks with keys and values of their own, by index of the block.

    Returns:
        Indices of blocks, by (kv_heads, head_dim), in the order of the first block of each.

    >>> by_shape({0: BlockHeads(0, 1, 32), 1: BlockHeads(1, 1, 64), 2: BlockHeads(2, 1, 32)})
    {(1, 32): [0, 2], (1, 64): [1]}
    """
    shapes: dict[tuple[int, int], list[int]] = {}
    for layer, of in heads.items():
        shapes.setdefault((of.kv_heads, of.head_dim), []).append(layer)
    return shapes


@dataclass(frozen=True)
class ModelFacts:
    """The model as it was exported.

    name: of the checkpoint.
    architecture: class name in the checkpoint's configuration.
    family: ``model_type`` in the checkpoint's configuration.
    parameters: number of weights.
    vocab_size: number of token ids.
    hidden_size: width of the residual stream.
    layers: decoder blocks.
    context_length: tokens of prompt and reply together.
    states: shapes of the ``STATES`` of a block with a delta net; empty where the model has no such block.
    attention: heads of each block; empty where all blocks have the heads of ``genai_config.json`` and keys and values
        of their own.
    """

    name: str
    architecture: str
    family: str
    parameters: int
    vocab_size: int
    hidden_size: int
    layers: int
    context_length: int
    states: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    attention: tuple[BlockHeads, ...] = ()


@dataclass(frozen=True)
class TargetFacts:
    """The machine that the bundle is for.

    name: of the target.
    engine: the engine that runs by default.
    arch: "aarch64", "x86_64" or "any".
    cpu: the core that the compiler optimised for; "" for none.
    features: instruction sets that the processor must have; names as in ``bundle.isa``.
    """

    name: str
    engine: str
    arch: str
    cpu: str
    features: tuple[str, ...]


@dataclass(frozen=True)
class Budget:
    """The average bits per weight that the routers can hold.

    min_bits: lowest budget.
    max_bits: highest budget.
    default_bits: the budget of an engine that is given none.

    >>> Budget(3.0, 8.0, 8.0).check(4, "bundle")
    4.0
    >>> Budget(3.0, 8.0, 8.0).check(9, "bundle")
    Traceback (most recent call last):
    mbq_runtime.errors.UsageError: average bits 9: bundle takes a number from 3 to 8
    """

    min_bits: float
    max_bits: float
    default_bits: float

    def check(self, avg_bits: float, where: str) -> float:
        """Return a budget as a float.

        Args:
            avg_bits: average bits per weight.
            where: the bundle, for the message.

        Raises:
            UsageError: ``avg_bits`` is not a number in the range.
        """
        try:
            value = float(avg_bits)
        except (TypeError, ValueError):
            value = math.nan
        if not self.min_bits <= value <= self.max_bits:  # NaN fails both comparisons
            raise UsageError(
                f"average bits {avg_bits}: {where} takes a number from {self.min_bits:g} to {self.max_bits:g}"
            )
        return value


@dataclass(frozen=True)
class RouterFacts:
    """The routers.

    kind: "static", "norm" or "mlp".
    bytes: size of all routers' parameters.
    """

    kind: str
    bytes: int


@dataclass(frozen=True)
class QualityPoint:
    """How the bundle predicts held-back text at one budget.

    asked_bits: the budget.
    avg_bits_used: average bits per weight that the routers then chose.
    perplexity: of the text.
    kl_divergence: mean KL divergence from the original model, in nats a token; NaN in bundles of early versions.
    same_top: share of the tokens where both find the same next token most likely; NaN in bundles of early versions.
    """

    asked_bits: float
    avg_bits_used: float
    perplexity: float
    kl_divergence: float = math.nan
    same_top: float = math.nan


@dataclass(frozen=True)
class Quality:
    """What the exporter measured.

    reference_perplexity: of the original model, on the same text.
    floor_bits: the quality floor: lowest average bits per weight that the exporter recommends.
    curve: by rising budgets.
    """

    reference_perplexity: float
    floor_bits: float
    curve: tuple[QualityPoint, ...]


NOT_MEASURED = Quality(0.0, 0.0, ())


@dataclass(frozen=True)
class Linear:
    """One routed matrix.

    name: of its unit and role.
    N: rows, which are outputs.
    K: columns, which are inputs.
    """

    name: str
    N: int
    K: int


@dataclass(frozen=True)
class Weights:
    """The weights that a decoded token reads.

    routed_parameters: number of weights that follow the budget.
    bytes_per_token: bytes read for a decoded token, by average bits per weight (as text: "3" or "3.5").
    linears: all routed matrices in graph order.
    """

    routed_parameters: int
    bytes_per_token: Mapping[str, int]
    linears: tuple[Linear, ...]
