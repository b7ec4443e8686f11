"""Sliced matrix product: ``y = x' @ w(depth).T`` for one depth, from its planes only.

C is the level in units of ``2**unit``, minus what was subtracted if the instruction set takes signed bytes. q are the
activations as integers in units of a. A group adds to a row, in units of ``row_scale / 256``,

    scale * (step * 2**unit * a * dot(C, q)  +  (step * middle - zero / 64) * a * sum(q))

where ``step`` is the profile's, and ``middle`` is the profile's plus what was subtracted. The dot product takes the
``width`` bytes of q one by one. The sum of the high bytes is shifted and the sum of the low bytes added, which is exact
in 32 bits. Both kernels work on row blocks of 16 and on groups. The numbers of blocks and groups are run-time values;
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
from .products import products_of, tree_sum
from .unpack import Operands, code_bytes, operands, tile_max_code

TILE_BYTES = 2 * ROW_BLOCK * TILE_K
"""Bytes of a tile of two row blocks. They stay in the first-level cache."""

TOKENS_AT_ONCE = 128
"""Tokens of one turn. Activations of a tile are then 128 KB, which stay in the second-level cache."""

SUM_BLOCKS = 8
"""Row blocks of one turn. Their sums are 64 KB, which stay in the second-level cache."""

_SUMS_BYTES = 4 * SUM_BLOCKS * TOKENS_AT_ONCE * ROW_BLOCK

SCRATCH_BYTES = TILE_BYTES + _SUMS_BYTES + 2 * (TILE_K // min(GROUP_SIZES)) * 2 * ROW_BLOCK * 4
"""Memory that the caller of ``gemm`` provides."""

OFFSET = 128
"""What whole bytes lose if the instruction set takes signed bytes."""

SCALES_BYTES = 2 * ROW_BLOCK
"""Of a row block: the float16 factors of its rows, or a group's scales and zeros."""

WEIGHT_POINTERS = {"planes": "uint8", "places": "int64", "scales": "uint8"}
"""Arguments of a kernel that are a sliced weight."""


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


def gemv(isa: Isa, plan: DepthPlan, group: int, width: int, name: str) -> None:
    """Kernel: the product of one token -> y float32 [(end - begin) * 16].

    Kernel arguments: q int8, the token's first byte, with ``rows`` tokens laid out as in ``activations.bytes_at``; step
    float32 [groups]; total float32 [groups], step times the sum of q; planes, scales uint8 and places int64 [slices],
    of the whole weight with ``blocks`` row blocks; begin, end: the row blocks to compute.

    Args:
        isa: instruction set.
        plan: how the depth is read.
        group: weights of a group.
        width: bytes of an activation.
        name: the function's symbol.
    """
    whole_bytes = [s for s in plan.segments if s.max_code > 127] if isa.signed else []
    middle = plan.middle + sum(OFFSET * s.factor * 2.0**s.unit_log2 for s in whole_bytes)
    together = isa.rows_together if len(plan.segments) == 1 else isa.rows_together_deep
    ahead = isa.prefetch_bytes // (ROW_BLOCK * group * plan.bits // 8)  # groups
    pointers = {"q": "int8", "step": "float32", "total": "float32", **WEIGHT_POINTERS, "y": "float32"}
    with function(name, pointers, ("blocks", "groups", "rows", "begin", "end")) as args:
        q, step, total, planes, places, scales, y, blocks, groups, rows, begin, end = args
        starts = plane_starts(plan, places, blocks, groups, group)
        acc = registers(ROW_BLOCK, "float32")
        with T.serial(0, end - begin) as b:
            for r in range(isa.vectors):
                store(acc, r * isa.rows, isa.rows, const(0, "float32", isa.rows))
            first = bind((begin + b) * groups)
            scales_at = bind(row_block_at(begin + b, groups))
            with T.serial(0, groups) as g:
                bytes_of_q = bytes_at(g, width, rows, group)
                sums = load(total, g, 1)
                unit = bind(load(step, g, 1) * const(plan.step * 2.0**plan.unit_log2, "float32"))
                middle_sums = bind(sums * const(middle * plan.step, "float32"))
                zero_sums = bind(sums * const(-1 / ZERO_STEPS, "float32"))
                base = bind(scales_at + (g + 1) * SCALES_BYTES)
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
                        scale, zero = _affine(scales, base + r * isa.rows, isa.rows)
                        value = fma(cast(dot, "float32", isa.rows), splat(unit, isa.rows), splat(middle_sums, isa.rows))
                        value = fma(zero, splat(zero_sums, isa.rows), value)
                        store(acc, r * isa.rows, isa.rows, fma(scale, value, load(acc, r * isa.rows, isa.rows)))
            for r in range(isa.vectors):
                factor = row_factors(scales, scales_at + 2 * r * isa.rows, isa.rows)
                store(y, b * ROW_BLOCK + r * isa.rows, isa.rows, load(acc, r * isa.rows, isa.rows) * factor)


def row_block_at(block: Expr, groups: Expr) -> Expr:
    """Where the factors of a row block's rows are. The scales of its groups follow.

    Args:
        block: which row block.
        groups: groups along K.
    """
    return block * (groups + 1) * SCALES_BYTES


def row_factors(scales: Any, at: Expr, rows: int) -> Expr:
    """What the scales of neighbouring rows are multiplied by, float32.

    Args:
        scales: uint8 buffer.
        at: the first row's factor, in bytes.
        rows: how many rows.
    """
    stored = reinterpret(load(scales, at, 2 * rows), "float16", rows)
    return bind(cast(stored, "float32", rows) * const(1 / SCALE_STEPS, "float32", rows))


def _affine(scales: Any, at: Expr, rows: int) -> tuple[Expr, Expr]:
    """(scale, zero) of neighbouring rows, float32."""
    return (
        bind(cast(load(scales, at, rows), "float32", rows)),
        bind(cast(load(scales, at + ROW_BLOCK, rows), "float32", rows)),
    )


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
        (self.q, self.step, self.total, self.planes, places, self.scales, self.y, self.tile, self.tokens,
         blocks, self.groups, self.rows, self.begin, self.end, self.count, self.y_stride) = args  # fmt: skip
        self.sums = T.decl_buffer((1 << 40,), "float32", data=T.handle_add_byte_offset(self.tile.data, TILE_BYTES))
        self.affine = T.decl_buffer(
            (1 << 40,), "float32", data=T.handle_add_byte_offset(self.tile.data, TILE_BYTES + _SUMS_BYTES)
        )
        self.starts = plane_starts(plan, places, blocks, self.groups, group)

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
                factor = row_factors(self.scales, row_block_at(self.begin + first + b, self.groups), ROW_BLOCK)
                value = load(self.sums, (b * TOKENS_AT_ONCE + i) * ROW_BLOCK, ROW_BLOCK)
                store(self.y, row * self.y_stride + (first + b) * ROW_BLOCK, ROW_BLOCK, value * factor)

    def _tile(self, turn: _Turn, block: Expr, wide: int, first_group: Expr, groups: Expr) -> None:
        """Unpack a tile and multiply all tokens of the turn with it."""
        isa = self.isa
        first = bind(self.begin + turn.first + block)
        self._unpack([bind((first + w) * self.groups + first_group) for w in range(wide)], groups)
        self._scales(first, wide, first_group, groups)
        tile = _Tile(block, wide, first_group, groups)
        # A single row block is rare, because callers cut pieces at pairs. It has only the loop for one token.
        taken: Expr = T.int64(0)
        for size in isa.token_blocks(self.width) if wide == isa.row_blocks else (1,):
            whole = bind((turn.tokens - taken) // size)
            with T.serial(0, whole) as i:
                self._tokens(turn, tile, size, bind(taken + i * size))
            taken = bind(taken + whole * size)

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
                    for half, codes in enumerate(code_bytes(isa, self.plan, at(r))):
                        for j, code in enumerate(products_of(isa).stored(codes)):
                            index = (s * STEP + half * 16 + 4 * j) * ROW_BLOCK + _in_tile(isa, w * isa.vectors + r)
                            store(self.tile, index, isa.vector_bytes, code)

    def _affine_at(self, w: int, g: Expr) -> Expr:
        return (w * (TILE_K // self.group) + g) * (2 * ROW_BLOCK)

    def _scales(self, block: Expr, wide: int, first_group: Expr, groups: Expr) -> None:
        """Write scale and offset of the tile's groups: a weight is ``code * scale + offset``, in units of its row."""
        plan, unit = self.plan, self.plan.tile_unit_log2
        middle = plan.middle + (OFFSET * 2.0**unit if self.isa.signed and tile_max_code(plan) > 127 else 0)

        def times(value: Expr, factor: float) -> Expr:
            return value * const(factor, "float32", ROW_BLOCK)

        for w in range(wide):
            first = bind(row_block_at(block + w, self.groups) + (first_group + 1) * SCALES_BYTES)
            with T.serial(0, groups) as g:
                scale, zero = _affine(self.scales, first + g * SCALES_BYTES, ROW_BLOCK)
                offset = scale * (const(middle * plan.step, "float32", ROW_BLOCK) - times(zero, 1 / ZERO_STEPS))
                store(self.affine, self._affine_at(w, g), ROW_BLOCK, times(scale, plan.step * 2.0**unit))
                store(self.affine, self._affine_at(w, g) + ROW_BLOCK, ROW_BLOCK, offset)

    def _tokens(self, turn: _Turn, tile: _Tile, count: int, at_token: Expr) -> None:
        """Add the product with the tile to the sums of ``count`` tokens from ``at_token`` of the turn on."""
        isa, plan, group = self.isa, self.plan, self.group
        max_code = tile_max_code(plan)
        rows, vectors = isa.rows, tile.wide * isa.vectors
        places = [bind(turn.done + at_token + m) for m in range(count)]
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
            sums = self._dots(count, vectors, max_code, [bind(start + g * group) for start in starts], g)
            for v in range(vectors):
                above, r = divmod(v, isa.vectors)
                at = self._affine_at(above, g) + r * rows
                scale, offset = load(self.affine, at, rows), load(self.affine, at + ROW_BLOCK, rows)
                for m in range(count):
                    dot = joined([run[v] for run in sums[m * self.width : (m + 1) * self.width]], rows)
                    value = bind(cast(dot, "float32", rows) * splat(load(self.step, steps_at[m] + g, 1), rows))
                    with_dot = fma(scale, value, load(acc[m], v * rows, rows))
                    total = splat(load(self.total, steps_at[m] + g, 1), rows)
                    store(acc[m], v * rows, rows, fma(offset, total, with_dot))
        for m in range(count):
            for v in range(vectors):
                store(self.sums, sum_at(m, v), rows, load(acc[m], v * rows, rows))

    def _dots(self, count: int, vectors: int, max_code: int, starts: list[Expr], g: Expr) -> list[list[Expr]]:
        """int32 [token and byte][row vector]: products with group ``g`` of the tile.

        All bytes are multiplied together, so that each weight is loaded once.
        """
        isa = self.isa
        products = products_of(isa)(isa, count * self.width, vectors, max_code)
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


def gemm(isa: Isa, plan: DepthPlan, group: int, width: int, name: str) -> None:
    """Kernel: the product of many tokens of one depth. It unpacks a row block once for TOKENS_AT_ONCE tokens.

    Kernel arguments: q int8, the first byte of the first token, with ``rows`` tokens laid out as in
    ``activations.bytes_at``; step, total float32 [count, groups], planes, places, scales, blocks, begin, end, as in
    ``gemv``; tokens int32 [count]: the row m of each token in y float32; y_stride: block ``begin + i`` of row m is
    written at ``m * y_stride + 16 * i``; scratch uint8 [SCRATCH_BYTES].

    Args:
        isa: instruction set.
        plan: how the depth is read.
        group: weights of a group.
        width: bytes of an activation.
        name: the function's symbol.
    """
    pointers = {"q": "int8", "step": "float32", "total": "float32", **WEIGHT_POINTERS}
    pointers |= {"y": "float32", "scratch": "uint8", "tokens": "int32"}
    with function(name, pointers, ("blocks", "groups", "rows", "begin", "end", "count", "y_stride")) as args:
        prefill = _Prefill(isa, plan, group, width, args)
        turns = bind((prefill.count + (TOKENS_AT_ONCE - 1)) // TOKENS_AT_ONCE)
        blocks = bind((prefill.end - prefill.begin + (SUM_BLOCKS - 1)) // SUM_BLOCKS)
        with T.serial(0, turns) as turn, T.serial(0, blocks) as b:
            prefill.turn(bind(turn * TOKENS_AT_ONCE), bind(b * SUM_BLOCKS))
