"""From the planes of a depth to the operands of a dot product, as data.

A byte of a 2-bit plane holds the fields of four weights, k = 4j + t for j = 0..3. Neighbouring planes are joined
*before* the dot product, in the same packed shape. Two planes become nibbles and four become whole codes, with one
shift and one bit-select per step.

A 16-entry byte look-up first widens 1-bit planes to that shape, in pairs if two are neighbours. The result is a list
of *segments*: runs of up to four 2-bit fields, each with four times the weight of the next. Coarse and fine planes are
never in one segment, because a coarse cell counts ``stride`` levels, which is no power of two.

>>> plan = plan_depth(SliceProfile.parse("3,1,2,2"), depth=4)
>>> [(s.factor, s.unit_log2, [f.planes for f in s.fields]) for s in plan.segments]
[(12, 0, [(0,), (1, 2)]), (1, 0, [(3,), (4,)])]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from mbq_runtime.bundle.slice_profile import SliceProfile

STEP = 32
"""Weights along K that one unpacking step covers: the span of a 64-byte block of a 1-bit plane."""

_NIBBLE = 2
"""Fields of a nibble. Parts of a deep level are joined to nibbles: a product with whole bytes could exceed 32 bits."""


@dataclass(frozen=True)
class Field:
    """A 2-bit field built from one 2-bit plane, two 1-bit planes, or one 1-bit plane.

    planes: indices of the planes, the high one first.
    two_bit: the field is one 2-bit plane.
    high: a single 1-bit plane is in the field's bit 1.
    unit_log2: log2 of the weight of the field's bit 0, in cells of the coarse or fine part.
    """

    planes: tuple[int, ...]
    two_bit: bool
    high: bool
    unit_log2: int


@dataclass(frozen=True)
class Segment:
    """Up to four fields, each with four times the weight of the next.

    fields: the most significant one first.
    factor: levels that a cell of the part counts: the depth's stride for coarse planes, else 1.
    """

    fields: tuple[Field, ...]
    factor: int

    @property
    def width(self) -> int:
        """Fields of the joined operand: 1, 2 or 4. Three fields get a fourth one of zeros."""
        return 4 if len(self.fields) == 3 else len(self.fields)

    @property
    def unit_log2(self) -> int:
        """Log2 of the weight of the joined value's bit 0, in cells."""
        return self.fields[-1].unit_log2 - 2 * (self.width - len(self.fields))

    @property
    def max_code(self) -> int:
        """The largest joined value."""
        return int(4**self.width) - 1


@dataclass(frozen=True)
class DepthPlan:
    """How a depth is read.

    profile: bits of each slice.
    depth: 1-based.
    segments: the operands that the planes are joined to.
    """

    profile: SliceProfile
    depth: int
    segments: tuple[Segment, ...]

    @property
    def bits(self) -> int:
        """Bits per weight."""
        return self.profile.depth_bits[self.depth - 1]

    @property
    def plane_bits(self) -> tuple[int, ...]:
        """Width in bits of each plane that the depth reads."""
        return self.profile.plane_bits[: self.profile.depth_planes[self.depth - 1]]

    @property
    def coarse_planes(self) -> int:
        """How many of the planes are coarse."""
        return sum(upto <= self.profile.coarse_bits for upto in accumulate(self.plane_bits))

    @property
    def stride(self) -> int:
        """Levels of a coarse cell."""
        return self.profile.stride(self.bits)

    @property
    def step(self) -> float:
        """Difference of two levels, in scales."""
        return self.profile.step(self.bits)

    @property
    def middle(self) -> float:
        """What a weight of level 0 is above the offset, in steps."""
        return self.profile.middle(self.bits)

    @property
    def max_level(self) -> int:
        """The largest level."""
        coarse = min(self.bits, self.profile.coarse_bits)
        return ((1 << coarse) - 1) * self.stride + (1 << (self.bits - coarse)) - 1

    @property
    def unit_log2(self) -> int:
        """Log2 of the weight of bit 0 of the integer dot product, in levels of the depth: 0 or negative."""
        return min(segment.unit_log2 for segment in self.segments)

    @property
    def tile_unit_log2(self) -> int:
        """As ``unit_log2``, for levels unpacked to one byte each. 0 if the padded level does not fit a byte."""
        return self.unit_log2 if self.max_level << -self.unit_log2 <= 255 else 0


def plane_places(profile: SliceProfile, planes: int) -> list[tuple[int, int]]:
    """Where the first ``planes`` planes begin: (slice from 0, bits per weight that the slice stores before the plane).

    Args:
        profile: bits of each slice.
        planes: how many planes are read.
    """
    found = [
        (index, before)
        for index, widths in enumerate(profile.planes_of_slices)
        for before in (0, *accumulate(widths))[:-1]
    ]
    return found[:planes]


def _fields(plane_bits: tuple[int, ...], first: int) -> list[Field]:
    """Planes of a part as 2-bit fields, most significant first. first: index of the first plane."""
    fields: list[Field] = []
    low, plane = sum(plane_bits), 0
    while plane < len(plane_bits):
        low -= plane_bits[plane]
        index = first + plane
        if plane_bits[plane] == 2:
            fields.append(Field((index,), True, False, low))
        elif plane_bits[plane + 1 : plane + 2] == (1,):
            low -= 1
            fields.append(Field((index, index + 1), False, False, low))
            plane += 1
        else:
            # A single bit below a field continues the run if it is in bit 1.
            follows = bool(fields) and fields[-1].unit_log2 == low + 1
            fields.append(Field((index,), False, follows, low - follows))
        plane += 1
    return fields


def _segments(fields: Iterable[Field], max_width: int, factor: int) -> list[Segment]:
    runs: list[list[Field]] = []
    for field in fields:
        run = runs[-1] if runs else []
        if run and len(run) < max_width and run[-1].unit_log2 == field.unit_log2 + 2:
            run.append(field)
        else:
            runs.append([field])
    return [Segment(tuple(run), factor) for run in runs]


def plan_depth(profile: SliceProfile, depth: int, max_width: int = 4) -> DepthPlan:
    """Plan how a depth is read.

    Args:
        profile: bits of each slice.
        depth: 1-based.
        max_width: fields that an instruction set joins at most: 4 (whole bytes) or 2 (nibbles).
    """
    whole = DepthPlan(profile, depth, ())
    planes, coarse = whole.plane_bits, whole.coarse_planes
    if coarse < len(planes):
        max_width = _NIBBLE
    segments = _segments(_fields(planes[:coarse], 0), max_width, whole.stride)
    segments += _segments(_fields(planes[coarse:], coarse), max_width, 1)
    return DepthPlan(profile, depth, tuple(segments))
