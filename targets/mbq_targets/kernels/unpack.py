"""Joins the planes of one step (32 weights along K) into dot-product operands."""

from __future__ import annotations

from collections.abc import Callable

from .emit import Expr, bind
from .isa import Isa
from .layout import DepthPlan, Field, Segment

PlaneLoad = Callable[[int, int], Expr]
"""(plane, half) -> the plane's bytes of weights 16 * half .. 16 * half + 15. A 1-bit plane has only half 0."""

Operands = list[list[list[tuple[Expr, int]]]]
"""[half][segment][j] -> (vector, e): the four operands of 16 weights. The vector is the joined code << e."""


def _spread(shift: int) -> tuple[int, ...]:
    """Look-up table from 4 bits to 4 fields: bit j of the index becomes bit 2j + shift."""
    return tuple(sum(((n >> j) & 1) << (2 * j + shift) for j in range(4)) for n in range(16))


LOW, HIGH = _spread(0), _spread(1)

OFFSET = 128
"""What whole bytes lose where a product takes signed bytes."""


def _field_halves(isa: Isa, field: Field, load: PlaneLoad) -> list[Expr]:
    """The 2-bit fields of k = 0..15 and k = 16..31, packed as in a 2-bit plane."""
    if field.two_bit:
        return [load(field.planes[0], half) for half in (0, 1)]
    tables = (HIGH, LOW) if len(field.planes) == 2 else (HIGH if field.high else LOW,)
    halves: list[list[Expr]] = [[], []]
    for plane, table in zip(field.planes, tables, strict=True):
        ones = load(plane, 0)
        for half, nibbles in enumerate((isa.bits(ones, 15), isa.bits(isa.shr(ones, 4), 15))):
            halves[half].append(isa.lookup(table, nibbles))
    return [parts[0] if len(parts) == 1 else bind(parts[0] | parts[1]) for parts in halves]


def _nibbles(isa: Isa, high: Expr, low: Expr) -> tuple[Expr, Expr]:
    """Two planes -> bytes with the nibbles of fields (0, 2) and of fields (1, 3)."""
    return isa.select(0x33, low, isa.shl(high, 2)), isa.select(0x33, isa.shr(low, 2), high)


def _bytes(isa: Isa, high: Expr, low: Expr) -> tuple[Expr, Expr]:
    """Nibbles of fields (i, i + 2) -> whole bytes of field i and of field i + 2."""
    return isa.select(0x0F, low, isa.shl(high, 4)), isa.select(0x0F, isa.shr(low, 4), high)


def _operands(isa: Isa, segment: Segment, fields: list[Expr], offset: bool) -> list[tuple[Expr, int]]:
    """Packed fields of 16 weights -> [(vector, e)] for j = 0..3. The vector is the joined code << e."""
    if segment.width == 1:
        return isa.split_pairs(fields[0])
    if segment.width == 2:
        even, odd = _nibbles(isa, *fields)
        (f0, e0), (f2, e2) = isa.split_nibbles(even)
        (f1, e1), (f3, e3) = isa.split_nibbles(odd)
        return [(f0, e0), (f1, e1), (f2, e2), (f3, e3)]
    top = fields[0]
    if offset:
        # With the top bit of each field inverted, each byte is smaller by 128 when it is read as signed.
        top = bind(top ^ isa.mask(0xAA))
    even, odd = _nibbles(isa, top, fields[1])
    if len(fields) == 4:
        low_even, low_odd = _nibbles(isa, fields[2], fields[3])
    else:
        low_even, low_odd = isa.bits(isa.shl(fields[2], 2), 0xCC), isa.bits(fields[2], 0xCC)
    f0, f2 = _bytes(isa, even, low_even)
    f1, f3 = _bytes(isa, odd, low_odd)
    return [(f, 0) for f in (f0, f1, f2, f3)]


def operands(isa: Isa, plan: DepthPlan, load: PlaneLoad, offset: bool) -> Operands:
    """The dot-product operands of one step and one row vector.

    Args:
        isa: instruction set.
        plan: how the depth is read.
        load: loads the bytes of a plane.
        offset: subtract 128 from whole-byte codes, for instructions that take signed bytes.
    """
    per_segment = [[_field_halves(isa, field, load) for field in segment.fields] for segment in plan.segments]
    return [
        [
            _operands(isa, segment, [halves[half] for halves in fields], offset)
            for segment, fields in zip(plan.segments, per_segment, strict=True)
        ]
        for half in (0, 1)
    ]


def code_bytes(isa: Isa, plan: DepthPlan, load: PlaneLoad, offset: bool) -> list[list[Expr]]:
    """[half][j] -> uint8 vector of levels in units of ``2**plan.tile_unit_log2``.

    Args:
        isa: instruction set.
        plan: how the depth is read.
        load: loads the bytes of a plane.
        offset: subtract ``OFFSET`` from each level.
    """
    result = []
    for half in operands(isa, plan, load, offset=False):
        codes = []
        for j in range(4):
            parts = [
                _levels(isa, segment, *fields[j], plan.tile_unit_log2)
                for segment, fields in zip(plan.segments, half, strict=True)
            ]
            code = parts[0]
            for part in parts[1:]:
                code = bind(code + part)
            if offset:
                code = bind(code ^ isa.mask(0x80))
            codes.append(code)
        result.append(codes)
    return result


def _levels(isa: Isa, segment: Segment, value: Expr, exponent: int, unit: int) -> Expr:
    """Levels that a joined value counts, in units of ``2**unit``. The vector ``value`` is the joined value << exponent.

    Exact: the bits that leave a byte are zero.
    """
    if segment.factor != 1:
        shift = segment.unit_log2 - unit
        table = tuple(int(nibble * segment.factor * 2.0**shift) & 255 for nibble in range(16))
        return isa.lookup(table, isa.shr(value, exponent) if exponent else value)
    shift = segment.unit_log2 - unit - exponent
    if shift == 0:
        return value
    return isa.shl(value, shift) if shift > 0 else isa.shr(value, -shift)


def tile_max_code(plan: DepthPlan) -> int:
    """The largest level of ``code_bytes``, before ``OFFSET`` is subtracted.

    Args:
        plan: how the depth is read.
    """
    return plan.max_level << -plan.tile_unit_log2
