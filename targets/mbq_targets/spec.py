"""What the kernels of a model depend on, apart from the machine."""

from __future__ import annotations

from dataclasses import dataclass

from mbq_runtime.bundle.facts import ACTIVATION_BITS, GROUP_SIZES
from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_runtime.errors import BuildError


@dataclass(frozen=True)
class KernelSpec:
    """What the kernels of one model are compiled for.

    profile: bits of each slice.
    group_size: weights that share a scale.
    activation_bits: bits of the integers that activations are rounded to.

    Raises:
        BuildError: no kernels exist for the group size or the activation bits.
    """

    profile: SliceProfile
    group_size: int
    activation_bits: int = 16

    def __post_init__(self) -> None:
        for what, value, values in (
            ("group size", self.group_size, GROUP_SIZES),
            ("activation bits", self.activation_bits, ACTIVATION_BITS),
        ):
            if value not in values:
                known = ", ".join(map(str, values))
                raise BuildError(f"{what} {value}: kernels exist for {known}; choose one of these")

    @property
    def activation_bytes(self) -> int:
        """Bytes of a rounded activation."""
        return self.activation_bits // 8

    def __str__(self) -> str:
        return f"slices={self.profile} group_size={self.group_size} activation_bits={self.activation_bits}"
