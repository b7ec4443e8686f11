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
from itertools import accumulate

from ..errors import UsageError

CODE_BITS = 8


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
        planes: list[int] = []
        for width in self.slices:
            planes += [2] * (width // 2) + [1] * (width % 2)
        return tuple(planes)

    @property
    def depth_planes(self) -> tuple[int, ...]:
        """How many planes each depth reads; entry ``k - 1`` belongs to depth ``k``."""
        return tuple(accumulate((width + 1) // 2 for width in self.slices))

    @property
    def depth_bits(self) -> tuple[int, ...]:
        """Bits per weight at each depth; entry ``k - 1`` belongs to depth ``k``."""
        return tuple(accumulate(self.slices))

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
