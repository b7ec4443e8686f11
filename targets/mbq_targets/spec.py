"""What the kernels of a model depend on, apart from the machine."""

from __future__ import annotations

from dataclasses import dataclass

from mbq_runtime.bundle.facts import ACTIVATION_BITS, GROUP_SIZES, KV_BITS
from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_runtime.errors import BuildError


@dataclass(frozen=True)
class KernelSpec:
    """What the kernels of one model are compiled for.

    profile: bits of each slice.
    group_size: weights that share a scale.
    activation_bits: bits of the integers that activations are rounded to.
    kv_bits: bits of a cached key or value; 32 is float32.

    Raises:
        BuildError: no kernels exist for the group size, the activation bits or the bits of keys and values.
    """

    profile: SliceProfile
    group_size: int
    activation_bits: int = 16
    kv_bits: int = 32

    def __post_init__(self) -> None:
        for what, value, values in (
            ("group size", self.group_size, GROUP_SIZES),
            ("activation bits", self.activation_bits, ACTIVATION_BITS),
            ("bits of keys and values", self.kv_bits, KV_BITS),
        ):
            if value not in values:
                known = ", ".join(map(str, values))
                raise BuildError(f"{what} {value}: kernels exist for {known}; choose one of these")

    @property
    def activation_bytes(self) -> int:
        """Bytes of a rounded activation."""
        return self.activation_bits // 8

    def __str__(self) -> str:
        cache = "" if self.kv_bits == 32 else f" kv_bits={self.kv_bits}"
        return f"slices={self.profile} group_size={self.group_size} activation_bits={self.activation_bits}{cache}"


@dataclass(frozen=True)
class DeltaNet:
    """The shape of a gated delta net. ``mbq_export.format.delta`` defines what it computes.

    key_heads: heads of queries and of keys.
    value_heads: heads of values, each with a memory of its own. Neighbours share a head of keys, so it is a multiple of
        key_heads.
    key_dim: channels in a head of keys. Kernels need a multiple of 16.
    value_dim: channels in a head of values. Kernels need a multiple of 16.
    taps: tokens that its convolution sees, the newest included.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int

    @property
    def keys(self) -> int:
        """Channels of all keys together."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Channels of all values together."""
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Channels that are convolved: those of queries, of keys and of values."""
        return 2 * self.keys + self.values

    @property
    def sizes(self) -> dict[str, int]:
        """Rows of the stacked projection: queries, keys and values; z; the strengths; the decays."""
        return {"mixed": self.channels, "z": self.values, "beta": self.value_heads, "decay": self.value_heads}

    @property
    def states(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what it keeps from pass to pass: the last tokens, and a memory for each head of values."""
        return {
            "conv": (self.channels, self.taps - 1),
            "recurrent": (self.value_heads, self.key_dim, self.value_dim),
        }


@dataclass(frozen=True)
class Experts:
    """The experts of all blocks of a model that have some: gated MLPs of one size, of which each token takes a few.

    ``mbq_export.format.experts`` defines how a token chooses experts.

    count: experts of a block; used: how many a token takes; ffn_size: width of one expert; blocks: whether a block has
    experts, by layer, and not one MLP.
    """

    count: int
    used: int
    ffn_size: int
    blocks: tuple[bool, ...]
    sigmoid: bool = False
    """The share of an expert is the sigmoid of its score.  False: shares are the softmax of the scores."""
    normed: bool = False
    """The weights of the experts that a token takes are divided by their sum."""
    sum_eps: float = 0.0
    """Is added to the sum."""
    scale: float = 1.0
    """What the weights are multiplied by."""
    biased: bool = False
    """Experts are chosen by their shares plus a bias of each expert."""
