"""Sliced matrix product: ``y = x' @ w(depth).T`` for one depth, from its planes only.

With C the joined code (a code in units of ``2**unit``, minus 128 where the ISA is signed), q the 16-bit activations
in units of a and s = scale * 2**(2 - bits), a group adds to a row

    a * s * 2**unit * dot(C, q)  +  (s * 2**unit * middle + offset) * a * sum(q)

where ``middle`` is half a code plus whatever was subtracted.  Bytes of q are multiplied, the high ones' sum is
shifted and the low ones' added: exact in 32 bits.  Both kernels work on row blocks of 16 and on groups, whose
numbers are run-time values; only the group size is compiled in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from .activations import LOW_BITS, TERMS
from .emit import Expr, bind, cast, const, fma, function, load, registers, splat, store
from .isa import Accumulator, Isa
from .layout import ROW_BLOCK, STEP, DepthPlan, plane_offsets
from .products import tree_sum
from .unpack import Operands, code_bytes, operands, tile_max_code

# Weights along K of one prefill tile: a row block of this many codes is 8 KB; one or two stay in the first cache.
TILE_K = 512
# Bytes of scratch that holds the row blocks of a tile.
TILE_BYTES = 2 * ROW_BLOCK * TILE_K
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
            value = tree_sum(values)
            if shift:
                amount = const(abs(shift), "int32", self.isa.rows)
                value = bind(value << amount if shift > 0 else value >> amount)
            total = value if total is None else bind(total + value)
        return total


def gemv(isa: Isa, plan: DepthPlan, group: int, name: str) -> None:
    """One token: q i8 [K], step f32 [G], total f32 [G] (step * sum of q) -> y f32 [(end - begin) * 16].

    The low bytes of the activations lie ``apart`` groups further on in q.
    planes, scales: the whole weight's; blocks: its row blocks; [begin, end): those to compute.
    """
    offset_at = 2.0**-plan.unit_log2 / 2
    shifts = [s.unit_log2 - plan.unit_log2 for s in plan.segments if s.max_code > 127]
    middle = offset_at + (sum(OFFSET << shift for shift in shifts) if isa.signed else 0)
    factor = 2.0 ** (2 - plan.bits + plan.unit_log2)
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
                bytes_at = [bind((t * apart + g) * group) for t in range(TERMS)]
                sums = load(total, g, 1)
                unit = bind(load(step, g, 1) * const(factor, "float32"))
                middle_sums = bind(sums * const(middle * factor, "float32"))
                base = bind((first + g) * (2 * ROW_BLOCK))
                with T.serial(0, isa.vectors // isa.rows_together) as bundle:
                    rows = [[_RowDots(isa, plan) for _ in range(TERMS)] for _ in range(isa.rows_together)]
                    vectors = [bundle * isa.rows_together + i for i in range(isa.rows_together)]
                    for s in range(group // STEP):
                        acts = [
                            [*isa.activations(q, at + s * STEP), *isa.activations(q, at + s * STEP + 16)]
                            for at in bytes_at
                        ]
                        at = plane_loader(isa, plan, planes, starts, (first + g) * (group // STEP) + s)
                        for r, row in zip(vectors, rows, strict=True):
                            codes = operands(isa, plan, at(r), isa.signed)
                            for dots, act in zip(row, acts, strict=True):
                                dots.add_step(codes, act)
                    for r, (high, low) in zip(vectors, rows, strict=True):
                        dot = bind((high.result() << const(LOW_BITS, "int32", isa.rows)) + low.result())
                        scale, offset = _affine(isa, scales, base + r * isa.rows)
                        value = fma(cast(dot, "float32", isa.rows), splat(unit, isa.rows), splat(middle_sums, isa.rows))
                        y_row = fma(scale, value, load(acc, r * isa.rows, isa.rows))
                        store(acc, r * isa.rows, isa.rows, fma(offset, splat(sums, isa.rows), y_row))
            for r in range(isa.vectors):
                store(y, b * ROW_BLOCK + r * isa.rows, isa.rows, load(acc, r * isa.rows, isa.rows))


def _affine(isa: Isa, scales: Any, at: Expr) -> tuple[Expr, Expr]:
    """(scale, offset) of a row vector, float32."""
    rows = isa.rows
    return (
        bind(cast(load(scales, at, rows), "float32", rows)),
        bind(cast(load(scales, at + ROW_BLOCK, rows), "float32", rows)),
    )


def _tokens(isa: Isa, plan: DepthPlan, group: int, count: int, wide: int, args: dict[str, Any], position: Expr) -> None:
    """y of ``count`` tokens += one tile: ``wide`` row blocks x ``args["tile_groups"]`` groups."""
    max_code = tile_max_code(plan)
    unit = plan.tile_unit_log2
    middle = 2.0**-unit / 2 + (OFFSET if isa.signed and max_code > 127 else 0)
    factor = 2.0 ** (2 - plan.bits + unit)
    rows, vectors = isa.rows, wide * isa.vectors
    q, step, total, scales, y, tile = (args[n] for n in ("q", "step", "total", "scales", "y", "tile"))
    groups, first_group, apart = args["groups"], args["first_group"], args["apart"]
    token = [bind(cast(load(args["tokens"], position + m, 1), "int64", 1)) for m in range(count)]
    y_at = [bind(t * args["y_stride"] + args["y_column"]) for t in token]
    starts = [bind(t * groups + first_group) for t in token]
    acc = [registers(rows * vectors, "float32") for _ in token]
    for m in range(count):
        for v in range(vectors):
            store(acc[m], v * rows, rows, load(y, y_at[m] + v * rows, rows))
    with T.serial(0, args["tile_groups"]) as g:
        products = isa.products(isa, count, vectors, max_code)
        for term in range(TERMS):
            if term:
                products.shift_up(LOW_BITS)
            for k in range(0, group, 16):
                at = bind((g * group + k) * ROW_BLOCK)

                def codes(j: int, v: int, at: Expr = at) -> Expr:
                    return load(tile, at + 4 * j * ROW_BLOCK + _in_tile(isa, v), isa.vector_bytes)

                products.add(codes, q, [bind((term * apart + start + g) * group + k) for start in starts])
        dots = products.results()
        for v in range(vectors):
            block, r = divmod(v, isa.vectors)
            scale, offset = _affine(isa, scales, args["scale_base"][block] + g * (2 * ROW_BLOCK) + r * rows)
            scale = bind(scale * const(factor, "float32", rows))
            offset = fma(scale, const(middle, "float32", rows), offset)
            for m in range(count):
                value = bind(cast(dots[m][v], "float32", rows) * splat(load(step, starts[m] + g, 1), rows))
                y_row = fma(scale, value, load(acc[m], v * rows, rows))
                store(acc[m], v * rows, rows, fma(offset, splat(load(total, starts[m] + g, 1), rows), y_row))
    for m in range(count):
        for v in range(vectors):
            store(y, y_at[m] + v * rows, rows, load(acc[m], v * rows, rows))


def _in_tile(isa: Isa, vector: int) -> int:
    """Where a row vector of a tile's first four weights lies: blocks of 16 rows one after the other."""
    block, r = divmod(vector, isa.vectors)
    return block * ROW_BLOCK * TILE_K + r * isa.vector_bytes


def gemm(isa: Isa, plan: DepthPlan, group: int, name: str) -> None:
    """Many tokens of one depth; each row block is unpacked once per TILE_K weights and used for all of them.

    q i8 [M, K], low bytes as in ``gemv``; step, total f32 [M, G]; tokens i32 [count]: the rows m of this depth;
    y f32: row m's values for block ``begin + i`` are written at ``m * y_stride + 16 * i``;
    tile: scratch of TILE_BYTES.
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

        def blocks_from(first: Expr, wide: int, first_group: Expr, tile_groups: Expr) -> None:
            """``wide`` row blocks from ``begin + first`` on."""
            bases = [bind((begin + first + w) * groups + first_group) for w in range(wide)]
            for w, base in enumerate(bases):
                with T.serial(0, tile_groups * (group // STEP)) as s:
                    at = plane_loader(isa, plan, planes, starts, base * (group // STEP) + s)
                    for r in range(isa.vectors):
                        for half, codes in enumerate(code_bytes(isa, plan, at(r))):
                            for j, code in enumerate(isa.products.stored(codes)):
                                index = (s * STEP + half * 16 + 4 * j) * ROW_BLOCK + _in_tile(isa, w * isa.vectors + r)
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
                "scale_base": [bind(base * (2 * ROW_BLOCK)) for base in bases],
                "y_stride": y_stride,
                "y_column": bind(first * ROW_BLOCK),
            }
            done: Expr = T.int64(0)
            # Callers cut their pieces so that a row block is seldom left over: less code will do for it.
            for size in isa.token_blocks if wide == isa.row_blocks else (2, 1):
                whole = bind((count - done) // size)
                with T.serial(0, whole) as i:
                    _tokens(isa, plan, group, size, wide, shared, done + i * size)
                done = bind(done + whole * size)

        # Tiles outermost: the activations of a tile stay cached while the row blocks pass.
        with T.serial(0, (groups + per_tile - 1) // per_tile) as chunk:
            first_group = bind(chunk * per_tile)
            tile_groups = bind(T.min(groups - first_group, T.int64(per_tile)))
            together = isa.row_blocks
            whole = bind((end - begin) // together)
            with T.serial(0, whole) as b:
                blocks_from(bind(b * together), together, first_group, tile_groups)
            if together > 1:
                with T.serial(0, end - begin - whole * together) as b:
                    blocks_from(bind(whole * together + b), 1, first_group, tile_groups)
