"""Slice profiles: how the 8 bits of a weight code are cut into slices.

A weight is one 8-bit code.  A *slice* is what a router adds or leaves out.  A *plane* is what is stored: 1 or 2 bits of
each code, most significant first.  A slice of three bits is stored as two planes (2 + 1).  Depth ``k`` reads the first
``k`` slices, which is a prefix of the planes.

>>> p = SliceProfile.parse("3,1,2,2")
>>> p.plane_bits, p.depth_planes, p.depth_bits
((2, 1, 1, 2, 2), (2, 3, 4, 5), (3, 4, 6, 8))
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, chain

from ..errors import UsageError

CODE_BITS = 8
_MOST_COARSE_BITS = 4


@dataclass(frozen=True)
class SliceProfile:
    """Slice widths of one model.

    slices: widths in bits, most significant first; each at least 1, and 8 in all.

    Raises:
        UsageError: a width is below 1, or the widths do not add up to 8.
    """

    slices: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.slices or min(self.slices) < 1 or sum(self.slices) != CODE_BITS:
            raise UsageError(
                f"slice widths {','.join(map(str, self.slices)) or '(none)'}: every width must be at least 1 "
                f"and they must add up to {CODE_BITS}; for example 2,2,2,2 or 3,1,2,2"
            )

    @classmethod
    def parse(cls, text: str) -> SliceProfile:
        """Read a list of widths.

        Args:
            text: such as "3,1,2,2".

        Raises:
            UsageError: the text is no such list.
        """
        try:
            return cls(tuple(int(part) for part in text.split(",")))
        except ValueError:
            raise UsageError(f"slice widths {text!r}: expected whole numbers such as 2,2,2,2 or 3,1,2,2") from None

    @property
    def plane_bits(self) -> tuple[int, ...]:
        """Width in bits (1 or 2) of each stored plane, most significant first."""
        return tuple(chain.from_iterable(self.planes_of_slices))

    @property
    def planes_of_slices(self) -> tuple[tuple[int, ...], ...]:
        """Width in bits of each plane of each slice."""
        return tuple((2,) * (width // 2) + (1,) * (width % 2) for width in self.slices)

    @property
    def depth_planes(self) -> tuple[int, ...]:
        """How many planes each depth reads; entry ``k - 1`` belongs to depth ``k``."""
        return tuple(accumulate((width + 1) // 2 for width in self.slices))

    @property
    def depth_bits(self) -> tuple[int, ...]:
        """Bits per weight at each depth; entry ``k - 1`` belongs to depth ``k``."""
        return tuple(accumulate(self.slices))

    @property
    def coarse_bits(self) -> int:
        """The bits of a code that count cells side by side: those of the deepest depth of at most 4 bits.

        The bits after them count levels of a span that is wider than a coarse cell.  So a weight that error feedback
        put into a neighbour's cell can still be reached.  8 if no depth has at most 4 bits, or if a deeper one has just
        one bit more: its levels could not be counted in whole numbers.
        """
        coarse = max((bits for bits in self.depth_bits if bits <= _MOST_COARSE_BITS), default=CODE_BITS)
        return coarse if all(bits >= coarse + 2 for bits in self.depth_bits if bits > coarse) else CODE_BITS

    def stride(self, bits: int) -> int:
        """Levels between neighbouring coarse cells at a depth: three quarters of the levels of such a cell.

        Args:
            bits: bits per weight of the depth.

        Returns:
            1 for a depth of at most ``coarse_bits``.
        """
        fine = bits - self.coarse_bits
        return 3 << (fine - 2) if fine > 0 else 1

    def step(self, bits: int) -> float:
        """Difference of two neighbouring levels of a depth, in scales.

        Args:
            bits: bits per weight of the depth.
        """
        return float(2.0 ** (2 - min(bits, self.coarse_bits))) / self.stride(bits)

    def middle(self, bits: int) -> float:
        """What a weight of level 0 is above the offset at a depth, in steps.

        Args:
            bits: bits per weight of the depth.
        """
        levels = 1 << max(0, bits - self.coarse_bits)
        return (self.stride(bits) + 1 - levels) / 2

    @property
    def depths(self) -> int:
        """The number of depths, E."""
        return len(self.slices)

    @property
    def min_bits(self) -> int:
        """Bits per weight at depth 1: the lowest average a budget can ask for."""
        return self.depth_bits[0]

    def __str__(self) -> str:
        return ",".join(map(str, self.slices))
