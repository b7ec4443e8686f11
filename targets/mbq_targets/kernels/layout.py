"""From the planes of a depth to the operands of a dot product, as data.

A byte of a 2-bit plane holds the fields of four weights, k = 4j + t for j = 0..3. Neighbouring planes are joined
*before* the dot product, in the same packed shape. Two planes become nibbles and four become whole codes, with one
shift and one bit-select per step. A depth of 8 bits then costs one dot product per four weights instead of four, and
needs no accumulator per plane.

A 16-entry byte look-up first widens 1-bit planes to that shape, in pairs if two are neighbours. The result is a list
of *segments*: runs of up to four 2-bit fields, each with four times the weight of the next.

>>> plan = plan_depth((2, 1, 1, 2, 2), planes=3)  # profile 3,1,2,2 at depth 2: four bits
>>> [(s.unit_log2, [f.planes for f in s.fields]) for s in plan.segments]
[(0, [(0,), (1, 2)])]
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

STEP = 32
"""Weights along K that one unpacking step covers: the span of a 64-byte block of a 1-bit plane."""


@dataclass(frozen=True)
class Field:
    """A 2-bit field built from one 2-bit plane, two 1-bit planes, or one 1-bit plane.

    planes: indices of the planes, the high one first.
    two_bit: the field is one 2-bit plane.
    high: a single 1-bit plane is in the field's bit 1.
    unit_log2: log2 of the weight of the field's bit 0, in codes of the depth.
    """

    planes: tuple[int, ...]
    two_bit: bool
    high: bool
    unit_log2: int


@dataclass(frozen=True)
class Segment:
    """Up to four fields, each with four times the weight of the next.

    fields: the most significant one first.
    """

    fields: tuple[Field, ...]

    @property
    def width(self) -> int:
        """Fields of the joined operand: 1, 2 or 4. Three fields get a fourth one of zeros."""
        return 4 if len(self.fields) == 3 else len(self.fields)

    @property
    def unit_log2(self) -> int:
        """Log2 of the weight of the joined value's bit 0, in codes of the depth."""
        return self.fields[-1].unit_log2 - 2 * (self.width - len(self.fields))

    @property
    def max_code(self) -> int:
        """The largest joined value."""
        return int(4**self.width) - 1


@dataclass(frozen=True)
class DepthPlan:
    """How a depth is read.

    bits: bits per weight.
    plane_bits: width in bits of each plane that the depth reads.
    segments: the operands that the planes are joined to.
    """

    bits: int
    plane_bits: tuple[int, ...]
    segments: tuple[Segment, ...]

    @property
    def unit_log2(self) -> int:
        """Log2 of the weight of bit 0 of the integer dot product, in codes of the depth: 0 or negative."""
        return min(segment.unit_log2 for segment in self.segments)

    @property
    def tile_unit_log2(self) -> int:
        """As ``unit_log2``, for codes unpacked to one byte each. 0 if the padded code does not fit a byte."""
        unit = min(self.unit_log2, 0)
        return unit if self.bits - unit <= 8 else 0


def plane_offsets(plane_bits: tuple[int, ...]) -> tuple[int, ...]:
    """Bits per weight that are stored before each plane. Plane p starts at byte ``offset[p] * n16 * K / 8``.

    Args:
        plane_bits: width in bits of each plane.
    """
    return (0, *accumulate(plane_bits))[:-1]


def _fields(plane_bits: tuple[int, ...], bits: int) -> list[Field]:
    """The planes as 2-bit fields, most significant first."""
    fields: list[Field] = []
    low, plane = bits, 0
    while plane < len(plane_bits):
        low -= plane_bits[plane]
        if plane_bits[plane] == 2:
            fields.append(Field((plane,), True, False, low))
        elif plane_bits[plane + 1 : plane + 2] == (1,):
            low -= 1
            fields.append(Field((plane, plane + 1), False, False, low))
            plane += 1
        else:
            # A single bit below a field continues the run if it is in bit 1.
            follows = bool(fields) and fields[-1].unit_log2 == low + 1
            fields.append(Field((plane,), False, follows, low - follows))
        plane += 1
    return fields


def plan_depth(plane_bits: tuple[int, ...], planes: int, max_width: int = 4) -> DepthPlan:
    """Plan the depth that reads the first ``planes`` of the planes of widths ``plane_bits``.

    Args:
        plane_bits: width in bits of each stored plane.
        planes: how many planes the depth reads.
        max_width: fields that an instruction set joins at most: 4 (whole bytes) or 2 (nibbles).
    """
    used = plane_bits[:planes]
    bits = sum(used)
    segments: list[list[Field]] = []
    for field in _fields(used, bits):
        run = segments[-1] if segments else []
        if run and len(run) < max_width and run[-1].unit_log2 == field.unit_log2 + 2:
            run.append(field)
        else:
            segments.append([field])
    return DepthPlan(bits, used, tuple(Segment(tuple(run)) for run in segments))
