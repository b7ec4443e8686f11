"""Sliced matrix product: ``y = x' @ w(depth).T`` for one depth, from its planes only.

With C the joined code (a code in units of ``2**unit``, minus 128 where the ISA is signed) and
s = scale * 2**(2 - bits), a group adds to a row

    a * s * 2**unit * dot(C, q)  +  (s * 2**unit * middle + offset) * a * sum(q)

where ``middle`` is half a code plus whatever was subtracted.  Both kernels work on row blocks of
16 and on groups, whose numbers are run-time values; only the group size is compiled in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from .activations import TERMS
from .emit import Expr, bind, cast, const, fma, function, load, registers, splat, store
from .isa import Accumulator, Isa
from .layout import ROW_BLOCK, STEP, DepthPlan, plane_offsets
from .unpack import Operands, code_bytes, operands, tile_max_code

# Weights along K of one prefill tile: 16 rows of this many codes, 8 KB, stay in the first cache.
TILE_K = 512
OFFSET = 128


def plane_loader(isa: Isa, plan: DepthPlan, planes: Any, starts: list[Expr], step: Expr) -> Callable[..., Any]:
    """(row vector) -> PlaneLoad for one step: ``step`` counts 32-weight steps from the start of each plane."""

    def at(vector: Expr) -> Callable[[int, int], Expr]:
        def read(plane: int, half: int) -> Expr:
            blocks = plan.plane_bits[plane]
            index = starts[plane] + (step * blocks + half) * 64 + vector * isa.vector_bytes
            return load(planes, index, isa.vector_bytes)

        return read

    return at


def plane_starts(plan: DepthPlan, blocks: Expr, groups: Expr, group: int) -> list[Expr]:
    """Byte at which each plane begins."""
    area = blocks * groups * (ROW_BLOCK * group // 8)
    return [bind(area * offset) for offset in plane_offsets(plan.plane_bits)]


class _RowDots:
    """Integer dot products of one row vector over a group, whatever the segments and accumulators."""

    def __init__(self, isa: Isa, plan: DepthPlan) -> None:
        self.isa, self.plan = isa, plan
        self.accumulators: dict[tuple[int, int, int], Accumulator] = {}

    def add_step(self, halves: Operands, acts: list[Expr]) -> None:
        """Add a step's operands, as ``unpack.operands`` gives them, times its eight activation vectors."""
        for half, segments in enumerate(halves):
            for index, fields in enumerate(segments):
                for j, (codes, exponent) in enumerate(fields):
                    key = (index, exponent, j % self.isa.chains)
                    if key not in self.accumulators:
                        largest = self.plan.segments[index].max_code << exponent
                        self.accumulators[key] = self.isa.accumulator(largest)
                    self.accumulators[key].add(codes, acts[4 * half + j])

    def result(self) -> Expr:
        """int32 dot product in units of ``2**plan.unit_log2``: every shift here is exact."""
        by_shift: dict[int, list[Expr]] = {}
        for (segment, exponent, _), accumulator in self.accumulators.items():
            shift = self.plan.segments[segment].unit_log2 - self.plan.unit_log2 - exponent
            by_shift.setdefault(shift, []).append(accumulator.result())
        total: Expr | None = None
        for shift, values in by_shift.items():
            value = _tree_sum(values)
            if shift:
                amount = const(abs(shift), "int32", self.isa.rows)
                value = bind(value << amount if shift > 0 else value >> amount)
            total = value if total is None else bind(total + value)
        return total


def _tree_sum(values: list[Expr]) -> Expr:
    while len(values) > 1:
        values = [bind(sum(values[i + 1 : i + 2], values[i])) for i in range(0, len(values), 2)]
    return values[0]


class _GroupScalars:
    """What a token's group contributes to every row: a * 2**(2 - bits + unit) of each term, then middle * that
    * sum(q) and a * sum(q) over the terms.  ``at``: the group of each term in step and total."""

    def __init__(self, step: Any, total: Any, at: list[Expr], bits: int, unit: int, middle: float) -> None:
        factor = 2.0 ** (2 - bits + unit)
        self.dots = [bind(load(step, g, 1) * const(factor, "float32")) for g in at]
        self.offset = _tree_sum([load(total, g, 1) for g in at])
        self.middle = bind(self.offset * const(middle * factor, "float32"))


def _accumulate(
    isa: Isa, scales: Any, base: Expr, r: Expr, y: Any, y_at: int, dots: list[Expr], by: _GroupScalars
) -> None:
    """y[y_at + row] += scale * (sum of by.dots * dots + by.middle) + offset * by.offset for the rows of ``r``."""
    rows = isa.rows
    scale = cast(load(scales, base + r * rows, rows), "float32", rows)
    offset = cast(load(scales, base + ROW_BLOCK + r * rows, rows), "float32", rows)
    # The smallest term first, so that its bits are not lost in the largest.
    term = splat(by.middle, rows)
    for dot, factor in zip(reversed(dots), reversed(by.dots), strict=True):
        term = fma(cast(dot, "float32", rows), splat(factor, rows), term)
    y_row = fma(scale, term, load(y, y_at + r * rows, rows))
    store(y, y_at + r * rows, rows, fma(offset, splat(by.offset, rows), y_row))


def gemv(isa: Isa, plan: DepthPlan, group: int, name: str) -> None:
    """One token: q i8 [K], step f32 [G], total f32 [G] (step * sum of q) -> y f32 [(end - begin) * 16].

    Term t of the activations lies ``t * apart`` groups further on in all three.
    planes, scales: the whole weight's; blocks: its row blocks; [begin, end): those to compute.
    """
    offset_at = 2.0**-plan.unit_log2 / 2
    shifts = [s.unit_log2 - plan.unit_log2 for s in plan.segments if s.max_code > 127]
    middle = offset_at + (sum(OFFSET << shift for shift in shifts) if isa.signed else 0)
    pointers = {"q": "int8", "step": "float32", "total": "float32", "planes": "uint8"}
    pointers |= {"scales": "float16", "y": "float32"}
    with function(name, pointers, ("blocks", "groups", "apart", "begin", "end")) as args:
        q, step, total, planes, scales, y, blocks, groups, apart, begin, end = args
        starts = plane_starts(plan, blocks, groups, group)
        acc = registers(ROW_BLOCK, "float32")
        with T.serial(0, end - begin) as b:
            for r in range(isa.vectors):
                store(acc, r * isa.rows, isa.rows, const(0, "float32", isa.rows))
            first = bind((begin + b) * groups)
            with T.serial(0, groups) as g:
                terms = [bind(t * apart + g) for t in range(TERMS)]
                by = _GroupScalars(step, total, terms, plan.bits, plan.unit_log2, middle)
                base = bind((first + g) * (2 * ROW_BLOCK))
                with T.serial(0, isa.vectors // isa.rows_together) as bundle:
                    rows = [[_RowDots(isa, plan) for _ in terms] for _ in range(isa.rows_together)]
                    vectors = [bundle * isa.rows_together + i for i in range(isa.rows_together)]
                    for s in range(group // STEP):
                        acts = [
                            [
                                *isa.activations(q, at * group + s * STEP),
                                *isa.activations(q, at * group + s * STEP + 16),
                            ]
                            for at in terms
                        ]
                        at = plane_loader(isa, plan, planes, starts, (first + g) * (group // STEP) + s)
                        for r, row in zip(vectors, rows, strict=True):
                            codes = operands(isa, plan, at(r), isa.signed)
                            for dots, act in zip(row, acts, strict=True):
                                dots.add_step(codes, act)
                    for r, row in zip(vectors, rows, strict=True):
                        _accumulate(isa, scales, base, r, acc, 0, [dots.result() for dots in row], by)
            for r in range(isa.vectors):
                store(y, b * ROW_BLOCK + r * isa.rows, isa.rows, load(acc, r * isa.rows, isa.rows))


def _tokens(isa: Isa, plan: DepthPlan, group: int, count: int, args: dict[str, Any], position: Expr) -> None:
    """y of ``count`` tokens += one tile: 16 rows x ``args["tile_groups"]`` groups."""
    max_code = tile_max_code(plan)
    unit = plan.tile_unit_log2
    middle = 2.0**-unit / 2 + (OFFSET if isa.signed and max_code > 127 else 0)
    q, step, total, scales, y, tile = (args[n] for n in ("q", "step", "total", "scales", "y", "tile"))
    groups, first_group, scale_base = args["groups"], args["first_group"], args["scale_base"]
    apart = args["apart"]
    token = [bind(cast(load(args["tokens"], position + m, 1), "int64", 1)) for m in range(count)]
    y_at = [bind(t * args["y_stride"] + args["y_column"]) for t in token]
    at = [[bind(t * groups + term * apart + first_group) for term in range(TERMS)] for t in token]
    acc = registers(ROW_BLOCK * count, "float32")
    for m in range(count):
        for r in range(isa.vectors):
            store(acc, ROW_BLOCK * m + r * isa.rows, isa.rows, load(y, y_at[m] + r * isa.rows, isa.rows))
    chains = isa.chains if count < isa.chains else 1
    with T.serial(0, args["tile_groups"]) as g:
        dots = [
            [[[isa.accumulator(max_code) for _ in range(chains)] for _ in range(TERMS)] for _ in range(isa.vectors)]
            for _ in range(count)
        ]
        for k in range(0, group, 16):
            acts = [[isa.activations(q, (start + g) * group + k) for start in starts] for starts in at]
            for j in range(4):
                for r in range(isa.vectors):
                    index = (g * group + k + 4 * j) * ROW_BLOCK + r * isa.vector_bytes
                    codes = load(tile, index, isa.vector_bytes)
                    for m in range(count):
                        for term in range(TERMS):
                            dots[m][r][term][j % chains].add(codes, acts[m][term][j])
        for m in range(count):
            by = _GroupScalars(step, total, [bind(start + g) for start in at[m]], plan.bits, unit, middle)
            base = bind(scale_base + g * (2 * ROW_BLOCK))
            for r, row in enumerate(dots[m]):
                sums = [_tree_sum([chain.result() for chain in chained]) for chained in row]
                _accumulate(isa, scales, base, r, acc, ROW_BLOCK * m, sums, by)
    for m in range(count):
        for r in range(isa.vectors):
            store(y, y_at[m] + r * isa.rows, isa.rows, load(acc, ROW_BLOCK * m + r * isa.rows, isa.rows))


def gemm(isa: Isa, plan: DepthPlan, group: int, name: str) -> None:
    """Many tokens of one depth; each row block is unpacked once per TILE_K weights and used for all of them.

    q i8 [M, K], step, total f32 [M, G]; tokens i32 [count]: the rows m of this depth;
    y f32: row m's values for block ``begin + i`` are written at ``m * y_stride + 16 * i``;
    tile: scratch of 16 * TILE_K bytes.
    """
    pointers = {"q": "int8", "step": "float32", "total": "float32", "planes": "uint8", "scales": "float16"}
    pointers |= {"y": "float32", "tile": "uint8", "tokens": "int32"}
    with function(name, pointers, ("blocks", "groups", "apart", "begin", "end", "count", "y_stride")) as args:
        q, step, total, planes, scales, y, tile, tokens, blocks, groups, apart, begin, end, count, y_stride = args
        starts = plane_starts(plan, blocks, groups, group)
        per_tile = TILE_K // group
        zero = const(0, "float32", ROW_BLOCK)
        with T.serial(0, end - begin) as b, T.serial(0, count) as i:
            row = bind(cast(load(tokens, i, 1), "int64", 1))
            store(y, row * y_stride + b * ROW_BLOCK, ROW_BLOCK, zero)
        # Tiles outermost: the activations of a tile stay cached while the row blocks pass.
        with T.serial(0, (groups + per_tile - 1) // per_tile) as chunk, T.serial(0, end - begin) as b:
            first_group = bind(chunk * per_tile)
            tile_groups = bind(T.min(groups - first_group, T.int64(per_tile)))
            first = bind((begin + b) * groups + first_group)
            with T.serial(0, tile_groups * (group // STEP)) as s:
                at = plane_loader(isa, plan, planes, starts, first * (group // STEP) + s)
                for r in range(isa.vectors):
                    for half, codes in enumerate(code_bytes(isa, plan, at(r))):
                        for j, code in enumerate(codes):
                            index = (s * STEP + half * 16 + 4 * j) * ROW_BLOCK + r * isa.vector_bytes
                            store(tile, index, isa.vector_bytes, code)
            shared = {
                "q": q,
                "step": step,
                "total": total,
                "scales": scales,
                "y": y,
                "tile": tile,
                "tokens": tokens,
                "groups": groups,
                "apart": apart,
                "first_group": first_group,
                "tile_groups": tile_groups,
                "scale_base": bind(first * (2 * ROW_BLOCK)),
                "y_stride": y_stride,
                "y_column": b * ROW_BLOCK,
            }
            done: Expr = T.int64(0)
            for size in dict.fromkeys(-(-size // TERMS) for size in isa.token_blocks):
                whole = bind((count - done) // size)
                with T.serial(0, whole) as i:
                    _tokens(isa, plan, group, size, shared, done + i * size)
                done = bind(done + whole * size)
