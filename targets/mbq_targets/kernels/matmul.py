"""Sliced matrix product: ``y = x' @ w(depth).T`` for one depth, from its planes only.

C is the level in units of ``2**unit``, minus what was subtracted if the instruction set takes signed bytes. q are the
activations as integers in units of a. ``Levels`` says what a group adds to a row. The dot product takes the ``width``
bytes of q one by one. The sum of the high bytes is shifted and the sum of the low bytes added, which is exact
in 32 bits. The kernels work on row blocks of 16 and on groups. The numbers of blocks and groups are run-time values;
only the group size is compiled in.

``planes`` is the address of the first slice. ``places`` has, for each slice, its place from there in bytes. So the
slices of a matrix can lie anywhere. A kernel reads no slice that is deeper than its depth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tvm.tirx.script import builder as T

from mbq_runtime.bundle.facts import GROUP_SIZES
from mbq_runtime.bundle.layout import ROW_BLOCK, SCALE_STEPS, ZERO_STEPS

from .activations import TILE_K, bytes_at, chunks, joined
from .emit import Expr, bind, cast, const, fma, function, load, prefetch, registers, reinterpret, splat, store
from .isa import Accumulator, Isa
from .layout import STEP, DepthPlan, plane_places
from .products import many_products, tree_sum
from .unpack import OFFSET, Operands, code_bytes, operands, tile_max_code

TILE_BYTES = 2 * ROW_BLOCK * TILE_K
"""Bytes of a tile of two row blocks. They stay in the first-level cache."""

TOKENS_AT_ONCE = 128
"""Tokens of one turn. Activations of a tile are then 128 KB, which stay in the second-level cache."""

SUM_BLOCKS = 8
"""Row blocks of one turn. Their sums are 64 KB, which stay in the second-level cache."""

_SUMS_BYTES = 4 * SUM_BLOCKS * TOKENS_AT_ONCE * ROW_BLOCK

SCRATCH_BYTES = TILE_BYTES + _SUMS_BYTES + 2 * (TILE_K // min(GROUP_SIZES)) * 2 * ROW_BLOCK * 4
"""Memory that the caller of ``gemm`` provides."""

SCALES_BYTES = 2 * ROW_BLOCK
"""Of a row block: the float16 factors of its rows, or a group's scales and zeros."""

WEIGHT_POINTERS = {"planes": "uint8", "places": "int64", "scales": "uint8"}
"""Arguments of a kernel that are a sliced weight."""

_MANY_SUMS = 8

ACTIVATION_POINTERS = {"q": "int8", "step": "float32", "total": "float32"}
"""Arguments of a kernel that are rounded activations."""


def plane_loader(isa: Isa, plan: DepthPlan, planes: Any, starts: list[Expr], step: Expr) -> Callable[..., Any]:
    """(row vector) -> ``unpack.PlaneLoad`` for one step.

    Args:
        isa: instruction set.
        plan: how the depth is read.
        planes: uint8 buffer.
        starts: byte at which each plane begins.
        step: steps of 32 weights from the start of each plane.
    """

    def at(vector: Expr) -> Callable[[int, int], Expr]:
        def read(plane: int, half: int) -> Expr:
            blocks = plan.plane_bits[plane]
            index = starts[plane] + (step * blocks + half) * 64 + vector * isa.vector_bytes
            return load(planes, index, isa.vector_bytes)

        return read

    return at


def plane_starts(plan: DepthPlan, places: Any, blocks: Expr, groups: Expr, group: int) -> list[Expr]:
    """Byte at which each plane begins, from the address of the first slice.

    Args:
        plan: how the depth is read.
        places: int64 buffer, the place of each slice.
        blocks: row blocks of the weight.
        groups: groups along K.
        group: weights of a group.
    """
    area = blocks * groups * (ROW_BLOCK * group // 8)
    return [
        bind((load(places, index, 1) if index else 0) + area * before)
        for index, before in plane_places(plan.profile, len(plan.plane_bits))
    ]


def prefetch_step(plan: DepthPlan, planes: Any, starts: list[Expr], step: Expr) -> None:
    """Prefetch the weights of a step, for all 16 rows of a block.

    Args:
        plan: how the depth is read.
        planes: uint8 buffer.
        starts: byte at which each plane begins.
        step: steps of 32 weights from the start of each plane.
    """
    for start, bits in zip(starts, plan.plane_bits, strict=True):
        for line in range(bits):
            prefetch(planes, start + (step * bits + line) * 64)


class _RowDots:
    """Integer dot products of one row vector over a group."""

    def __init__(self, isa: Isa, plan: DepthPlan) -> None:
        self.isa, self.plan = isa, plan
        self.chains = isa.chains if len(plan.segments) == 1 else 1
        self.accumulators: dict[tuple[int, int, int], Accumulator] = {}

    def add_step(self, halves: Operands, acts: list[Expr]) -> None:
        """Add the operands of a step (see ``unpack.operands``) times its eight activation vectors."""
        for half, segments in enumerate(halves):
            for index, fields in enumerate(segments):
                for j, (codes, exponent) in enumerate(fields):
                    key = (index, exponent, j % self.chains)
                    if key not in self.accumulators:
                        largest = self.plan.segments[index].max_code << exponent
                        self.accumulators[key] = self.isa.accumulator(largest)
                    self.accumulators[key].add(codes, acts[4 * half + j])

    def result(self) -> Expr:
        """int32 dot product in units of ``2**plan.unit_log2``. Every shift is exact."""
        by_factor: dict[int, dict[int, list[Expr]]] = {}
        for (index, exponent, _), accumulator in self.accumulators.items():
            segment = self.plan.segments[index]
            shift = segment.unit_log2 - self.plan.unit_log2 - exponent
            by_factor.setdefault(segment.factor, {}).setdefault(shift, []).append(accumulator.result())
        return tree_sum([self._scaled(factor, by_shift) for factor, by_shift in by_factor.items()])

    def _scaled(self, factor: int, by_shift: dict[int, list[Expr]]) -> Expr:
        """``factor`` times the sum of values, each shifted left by its key."""
        parts = []
        for shift, values in by_shift.items():
            value = tree_sum(values)
            if shift:
                amount = const(abs(shift), "int32", self.isa.rows)
                value = bind(value << amount if shift > 0 else value >> amount)
            parts.append(value)
        total = tree_sum(parts)
        return total if factor == 1 else bind(total * const(factor, "int32", self.isa.rows))


def subtracted(isa: Isa, plan: DepthPlan) -> float:
    """Levels that the weights of ``gemv`` lose, because the instruction set takes signed bytes.

    Args:
        isa: instruction set.
        plan: how the depth is read.
    """
    return sum(OFFSET * s.factor * 2.0**s.unit_log2 for s in plan.segments if isa.signed and s.max_code > 127)


def gemv(isa: Isa, plan: DepthPlan, group: int, width: int, name: str) -> None:
    """Kernel: the product of one token -> y float32 [(end - begin) * 16].

    Kernel arguments: q int8, laid out as in ``activations.bytes_at`` for a single token; step float32 [groups]; total
    float32 [groups], step times the sum of q; planes, scales uint8 and places int64 [slices], of the whole weight with
    ``blocks`` row blocks; begin, end: the row blocks to compute.

    Args:
        isa: instruction set.
        plan: how the depth is read.
        group: weights of a group.
        width: bytes of an activation.
        name: the function's symbol.
    """
    levels = Levels.of(plan, plan.unit_log2, subtracted(isa, plan))
    together = isa.rows_together if len(plan.segments) == 1 else isa.rows_together_deep
    ahead = isa.prefetch_bytes // (ROW_BLOCK * group * plan.bits // 8)  # groups
    pointers = {**ACTIVATION_POINTERS, **WEIGHT_POINTERS, "y": "float32"}
    with function(name, pointers, ("blocks", "groups", "begin", "end")) as args:
        q, step, total, planes, places, scales, y, blocks, groups, begin, end = args
        starts = plane_starts(plan, places, blocks, groups, group)
        acc = registers(ROW_BLOCK, "float32")
        with T.serial(0, end - begin) as b:
            for r in range(isa.vectors):
                store(acc, r * isa.rows, isa.rows, const(0, "float32", isa.rows))
            first = bind((begin + b) * groups)
            scales_at = bind(row_block_at(plan, begin + b, groups))
            with T.serial(0, groups) as g:
                bytes_of_q = bytes_at(g, width, T.int64(1), group)
                token = (load(step, g, 1), load(total, g, 1))
                base = bind(scales_at + (g + plan.profile.depths) * SCALES_BYTES)
                if isa.prefetch_bytes:
                    for s in range(group // STEP):
                        prefetch_step(plan, planes, starts, (first + g + ahead) * (group // STEP) + s)
                    prefetch(scales, base + ahead * SCALES_BYTES)
                with T.serial(0, isa.vectors // together) as bundle:
                    row_dots = [[_RowDots(isa, plan) for _ in range(width)] for _ in range(together)]
                    vectors = [bundle * together + i for i in range(together)]
                    for s in range(group // STEP):
                        acts = [
                            [*isa.activations(q, at + s * STEP), *isa.activations(q, at + s * STEP + 16)]
                            for at in bytes_of_q
                        ]
                        at = plane_loader(isa, plan, planes, starts, (first + g) * (group // STEP) + s)
                        for r, row in zip(vectors, row_dots, strict=True):
                            codes = operands(isa, plan, at(r), isa.signed)
                            for dots, act in zip(row, acts, strict=True):
                                dots.add_step(codes, act)
                    for r, of_bytes in zip(vectors, row_dots, strict=True):
                        dot = joined([dots.result() for dots in of_bytes], isa.rows)
                        scale, above = levels.affine(scales, base + r * isa.rows, isa.rows)
                        value = group_value(dot, above, token, isa.rows)
                        store(acc, r * isa.rows, isa.rows, fma(scale, value, load(acc, r * isa.rows, isa.rows)))
            for r in range(isa.vectors):
                factor = row_factors(plan, scales, scales_at + 2 * r * isa.rows, isa.rows, levels.unit)
                store(y, b * ROW_BLOCK + r * isa.rows, isa.rows, load(acc, r * isa.rows, isa.rows) * factor)


class Levels(NamedTuple):
    """The numbers of a depth that turn integer products into outputs. All but ``unit`` are exact in float32.

    A group adds ``scale * (a * dot(C, q) + (middle - zero * zero_step) * a * sum(q))`` to a row, in units of the row's
    factor times ``unit``.

    unit: what a level of the products is, in scales.
    middle: what a weight of code 0 is above the offset, in units.
    zero_step: of a group's zero, in units.
    """

    unit: float
    middle: float
    zero_step: float

    @classmethod
    def of(cls, plan: DepthPlan, unit_log2: int, subtracted: float) -> Levels:
        """The numbers of a depth.

        Args:
            plan: how the depth is read.
            unit_log2: log2 of the unit of the products, in levels.
            subtracted: levels that the codes lose.
        """
        unit = plan.step * 2.0**unit_log2
        return cls(unit, (plan.middle + subtracted) * 2.0**-unit_log2, 1 / (ZERO_STEPS * unit))

    def affine(self, scales: Any, at: Expr, rows: int) -> tuple[Expr, Expr]:
        """(scale, middle - zero * zero_step) of a group and neighbouring rows, float32.

        Args:
            scales: uint8 buffer.
            at: the first row's scale, in bytes.
            rows: how many rows.
        """
        scale = bind(cast(load(scales, at, rows), "float32", rows))
        zero = cast(load(scales, at + ROW_BLOCK, rows), "float32", rows)
        return scale, fma(zero, const(-self.zero_step, "float32", rows), const(self.middle, "float32", rows))


def group_value(dot: Expr, above: Expr, token: tuple[Expr, Expr], rows: int) -> Expr:
    """What a group adds to rows, in units of their scales, float32. The kernels give a token the same bits by it.

    Args:
        dot: int32 products.
        above: the second of ``Levels.affine``.
        token: step of the activations, and step times their sum.
        rows: lanes.
    """
    step, total = token
    return fma(above, splat(total, rows), bind(cast(dot, "float32", rows) * splat(step, rows)))


def row_block_at(plan: DepthPlan, block: Expr, groups: Expr) -> Expr:
    """Where the factors of a row block's rows are, those of the first depth first. The scales of its groups follow.

    Args:
        plan: how the depth is read.
        block: which row block.
        groups: groups along K.
    """
    return block * (groups + plan.profile.depths) * SCALES_BYTES


def row_factors(plan: DepthPlan, scales: Any, at: Expr, rows: int, unit: float = 1.0) -> Expr:
    """What sums of neighbouring rows are multiplied by at a depth, float32.

    Args:
        plan: how the depth is read.
        scales: uint8 buffer.
        at: the first row's factor at the first depth, in bytes.
        rows: how many rows.
        unit: of the sums, in scales.
    """
    stored = reinterpret(load(scales, at + (plan.depth - 1) * SCALES_BYTES, 2 * rows), "float16", rows)
    return bind(cast(stored, "float32", rows) * const(unit / SCALE_STEPS, "float32", rows))


class _Turn(NamedTuple):
    """The product of ``tokens`` tokens from ``done`` on with row blocks from ``begin + first`` on."""

    done: Expr
    tokens: Expr
    first: Expr


class _Tile(NamedTuple):
    """``wide`` row blocks from ``block`` of a turn on, and ``groups`` groups from ``first_group`` on."""

    block: Expr
    wide: int
    first_group: Expr
    groups: Expr


class _Prefill:
    """The loops of ``gemm`` and what they share.

    During a turn of TOKENS_AT_ONCE tokens and SUM_BLOCKS row blocks, sums are in scratch memory, float32
    [SUM_BLOCKS][TOKENS_AT_ONCE][16]. In y, the rows of a block are far apart and would compete for a few sets of the
    cache. Scales and offsets of a tile are there too, float32 [2][groups][2][16].
    """

    def __init__(self, isa: Isa, plan: DepthPlan, group: int, width: int, args: list[Any]) -> None:
        self.isa, self.plan, self.group, self.width = isa, plan, group, width
        (self.q, self.step, self.total, self.planes, places, self.scales, self.y, self.tile, self.tokens, _, blocks,
         self.groups, self.rows, self.begin, self.end, self.count, self.y_stride) = args  # fmt: skip
        self.sums = T.decl_buffer((1 << 40,), "float32", data=T.handle_add_byte_offset(self.tile.data, TILE_BYTES))
        self.affine = T.decl_buffer(
            (1 << 40,), "float32", data=T.handle_add_byte_offset(self.tile.data, TILE_BYTES + _SUMS_BYTES)
        )
        self.starts = plane_starts(plan, places, blocks, self.groups, group)
        self.products = many_products(isa, width)
        self.offset = self.products.offset(isa, tile_max_code(plan))
        self.levels = Levels.of(plan, plan.tile_unit_log2, self.offset * 2.0**plan.tile_unit_log2)

    def turn(self, done: Expr, first: Expr) -> None:
        """Compute a turn: clear the sums, add all groups, write y."""
        isa, per_tile = self.isa, TILE_K // self.group
        tokens = bind(T.min(self.count - done, T.int64(TOKENS_AT_ONCE)))
        blocks = bind(T.min(self.end - self.begin - first, T.int64(SUM_BLOCKS)))
        turn = _Turn(done, tokens, first)
        with T.serial(0, blocks) as b, T.serial(0, tokens) as i:
            store(self.sums, (b * TOKENS_AT_ONCE + i) * ROW_BLOCK, ROW_BLOCK, const(0, "float32", ROW_BLOCK))
        with T.serial(0, chunks(self.groups, self.group)) as chunk:
            first_group = bind(chunk * per_tile)
            groups = bind(T.min(self.groups - first_group, T.int64(per_tile)))
            whole = bind(blocks // isa.row_blocks)
            with T.serial(0, whole) as b:
                self._tile(turn, bind(b * isa.row_blocks), isa.row_blocks, first_group, groups)
            if isa.row_blocks > 1:
                with T.serial(0, blocks - whole * isa.row_blocks) as b:
                    self._tile(turn, bind(whole * isa.row_blocks + b), 1, first_group, groups)
        with T.serial(0, tokens) as i:
            row = bind(cast(load(self.tokens, done + i, 1), "int64", 1))
            with T.serial(0, blocks) as b:
                at = row_block_at(self.plan, self.begin + first + b, self.groups)
                factor = row_factors(self.plan, self.scales, at, ROW_BLOCK, self.levels.unit)
                value = load(self.sums, (b * TOKENS_AT_ONCE + i) * ROW_BLOCK, ROW_BLOCK)
                store(self.y, row * self.y_stride + (first + b) * ROW_BLOCK, ROW_BLOCK, value * factor)

    def _tile(self, turn: _Turn, block: Expr, wide: int, first_group: Expr, groups: Expr) -> None:
        """Unpack a tile and multiply all tokens of the turn with it."""
        isa = self.isa
        first = bind(self.begin + turn.first + block)
        self._unpack([bind((first + w) * self.groups + first_group) for w in range(wide)], groups)
        self._scales(first, wide, first_group, groups)
        tile = _Tile(block, wide, first_group, groups)
        # A single row block is rare, because callers cut pieces at pairs. It takes one token at a time.
        size = isa.many_tokens(self.width) if wide == isa.row_blocks else 1
        with T.serial(0, (turn.tokens + (size - 1)) // size) as i:
            self._tokens(turn, tile, size, bind(i * size))

    def _unpack(self, bases: list[Expr], groups: Expr) -> None:
        """Unpack the tile. bases: the first group of each row block, counted over the whole weight."""
        isa, steps = self.isa, self.group // STEP
        for w, base in enumerate(bases):
            with T.serial(0, groups * steps) as s:
                step = bind(base * steps + s)
                if isa.prefetch_bytes:  # of the next tile
                    prefetch_step(self.plan, self.planes, self.starts, step + len(bases) * self.groups * steps)
                at = plane_loader(isa, self.plan, self.planes, self.starts, step)
                for r in range(isa.vectors):
                    for half, codes in enumerate(code_bytes(isa, self.plan, at(r), self.offset > 0)):
                        for j, code in enumerate(self.products.stored(codes)):
                            index = (s * STEP + half * 16 + 4 * j) * ROW_BLOCK + _in_tile(isa, w * isa.vectors + r)
                            store(self.tile, index, isa.vector_bytes, code)

    def _affine_at(self, w: int, g: Expr) -> Expr:
        return (w * (TILE_K // self.group) + g) * (2 * ROW_BLOCK)

    def _scales(self, block: Expr, wide: int, first_group: Expr, groups: Expr) -> None:
        """Write ``Levels.affine`` of the tile's groups."""
        for w in range(wide):
            begin = row_block_at(self.plan, block + w, self.groups)
            first = bind(begin + (first_group + self.plan.profile.depths) * SCALES_BYTES)
            with T.serial(0, groups) as g:
                for i, value in enumerate(self.levels.affine(self.scales, first + g * SCALES_BYTES, ROW_BLOCK)):
                    store(self.affine, self._affine_at(w, g) + i * ROW_BLOCK, ROW_BLOCK, value)

    def _tokens(self, turn: _Turn, tile: _Tile, count: int, at_token: Expr) -> None:
        """Add the product with the tile to the sums of ``count`` tokens from ``at_token`` of the turn on.

        Past the end, the last token is repeated. Its further sums are not used.
        """
        isa, group = self.isa, self.group
        rows, vectors = isa.rows, tile.wide * isa.vectors
        places = [bind(turn.done + T.min(at_token + m, turn.tokens - 1)) for m in range(count)]
        steps_at = [bind(place * self.groups + tile.first_group) for place in places]
        starts = [
            bind(at + place * TILE_K)
            for place in places
            for at in bytes_at(tile.first_group, self.width, self.rows, group)
        ]

        def sum_at(m: int, v: int) -> Expr:
            above, r = divmod(v, isa.vectors)
            return ((tile.block + above) * TOKENS_AT_ONCE + at_token + m) * ROW_BLOCK + r * rows

        acc = [registers(rows * vectors, "float32") for _ in places]
        for m in range(count):
            for v in range(vectors):
                store(acc[m], v * rows, rows, load(self.sums, sum_at(m, v), rows))
        with T.serial(0, tile.groups) as g:
            dots = self._dots(count, vectors, [bind(start + g * group) for start in starts], g)
            of_tokens = [(load(self.step, at + g, 1), load(self.total, at + g, 1)) for at in steps_at]
            for v in range(vectors):
                above, r = divmod(v, isa.vectors)
                at = self._affine_at(above, g) + r * rows
                scale, above = load(self.affine, at, rows), load(self.affine, at + ROW_BLOCK, rows)
                for m in range(count):
                    value = group_value(dots[m][v], above, of_tokens[m], rows)
                    store(acc[m], v * rows, rows, fma(scale, value, load(acc[m], v * rows, rows)))
        for m in range(count):
            for v in range(vectors):
                store(self.sums, sum_at(m, v), rows, load(acc[m], v * rows, rows))

    def _dots(self, count: int, vectors: int, starts: list[Expr], g: Expr) -> list[list[Expr]]:
        """int32 [token][row vector]: products with group ``g`` of the tile.

        All tokens and bytes are multiplied together, so that each weight is loaded once.
        """
        isa = self.isa
        # With few sums, one dot product would wait for the other.
        chains = isa.chains if count * self.width * vectors < _MANY_SUMS else 1
        products = self.products(isa, count, self.width, vectors, tile_max_code(self.plan), chains=chains)
        for k in range(0, self.group, 16):
            at = bind((g * self.group + k) * ROW_BLOCK)

            def codes(j: int, v: int, at: Expr = at) -> Expr:
                return load(self.tile, at + 4 * j * ROW_BLOCK + _in_tile(isa, v), isa.vector_bytes)

            products.add(codes, self.q, [bind(start + k) for start in starts])
        return products.results()


def _in_tile(isa: Isa, vector: int) -> int:
    """Where a row vector of the first four weights of a tile is. A tile holds one block of 16 rows after the other."""
    block, r = divmod(vector, isa.vectors)
    return block * ROW_BLOCK * TILE_K + r * isa.vector_bytes


MANY_POINTERS = {
    **ACTIVATION_POINTERS, **WEIGHT_POINTERS, "y": "float32", "scratch": "uint8", "tokens": "int32", "sums": "int32",
}  # fmt: skip
MANY_INTEGERS = ("blocks", "groups", "rows", "begin", "end", "count", "y_stride")
"""Arguments of a kernel that multiplies several tokens."""


def gemm(isa: Isa, plan: DepthPlan, group: int, width: int, name: str) -> None:
    """Kernel: the product of many tokens of one depth. It unpacks a row block once for TOKENS_AT_ONCE tokens.

    Kernel arguments: q int8, the first byte of the first token, with ``rows`` tokens laid out as in
    ``activations.bytes_at``; step, total float32 [count, groups], planes, places, scales, blocks, begin, end, as in
    ``gemv``; tokens int32 [count]: the row m of each token in y float32; y_stride: block ``begin + i`` of row m is
    written at ``m * y_stride + 16 * i``; scratch uint8 [SCRATCH_BYTES]; sums int32 [count, groups], of q, unused here.

    Args:
        isa: instruction set.
        plan: how the depth is read.
        group: weights of a group.
        width: bytes of an activation.
        name: the function's symbol.
    """
    with function(name, MANY_POINTERS, MANY_INTEGERS) as args:
        prefill = _Prefill(isa, plan, group, width, args)
        turns = bind((prefill.count + (TOKENS_AT_ONCE - 1)) // TOKENS_AT_ONCE)
        blocks = bind((prefill.end - prefill.begin + (SUM_BLOCKS - 1)) // SUM_BLOCKS)
        with T.serial(0, turns) as turn, T.serial(0, blocks) as b:
            prefill.turn(bind(turn * TOKENS_AT_ONCE), bind(b * SUM_BLOCKS))
