"""What a token may read, as native code takes it: a budget, and the deepest depth."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.manifest import Manifest


class Allowance:
    """The budget of an engine under a ceiling.

    A router gives some tokens more bits than the budget, and others less.  Under a ceiling no token gets more than the
    ceiling's bits.  A budget of as many bits gives them to every token.

    manifest: of the bundle.
    bits: average bits per weight, within the bundle's range.
    ceiling_bits: most bits per weight of a token; None for the bundle's most.
    """

    def __init__(self, manifest: Manifest, bits: float, ceiling_bits: float | None = None) -> None:
        self._depth_bits = manifest.profile.depth_bits
        self._most_bits = manifest.budget.max_bits
        self.set(bits, ceiling_bits)

    def set(self, bits: float, ceiling_bits: float | None) -> None:
        """Change both.

        Args:
            bits: average bits per weight, within the bundle's range.
            ceiling_bits: most bits per weight of a token; None for the bundle's most.
        """
        most = self._most_bits if ceiling_bits is None else min(ceiling_bits, self._most_bits)
        self._deepest = max(sum(held <= most for held in self._depth_bits), 1)
        self.bits = self.within(bits)

    def within(self, bits: float) -> float:
        """A budget under the ceiling.

        Args:
            bits: average bits per weight.
        """
        return min(bits, float(self._depth_bits[self._deepest - 1]))

    def numbers_at(self, bits: float) -> NDArray[np.float32]:
        """What native code reads for a budget under this ceiling.

        Args:
            bits: average bits per weight.

        Returns:
            float32 [2]: average bits, and the deepest depth.
        """
        deepest = self._deepest  # other threads may change it
        # At the end of its table a router gives every token all that it may.
        at_top = bits >= self._depth_bits[deepest - 1]
        return np.array([self._depth_bits[-1] if at_top else bits, deepest], np.float32)

    @property
    def numbers(self) -> NDArray[np.float32]:
        """``numbers_at`` this budget."""
        return self.numbers_at(self.bits)
