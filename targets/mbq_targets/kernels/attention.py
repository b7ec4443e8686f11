"""Attention of a few queries over a range of a cache of 8 bits, with an online softmax, by products of integers.

``mbq_export.format.attention`` defines the cache and the result. Scores are products of queries with stored keys, and
what a head attends to is products of weights with stored values. Both are sums of ``products``, which take queries and
weights as they take activations, and keys and values as they take weights of a matrix. The rows of a call share a head
of keys and of values.

Scores count in powers of two, and have the logarithm of their value's scale added. So the largest score of a tile tells
the largest weighted value, and rounded weights use all their steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from tvm.tirx.script import builder as T

from mbq_runtime.bundle.layout import KEY_LANES, KV_SCALE_BYTES

from ..constants import WEIGHT_STEPS, WEIGHT_TOKENS
from .activations import store_bytes, store_pairs
from .emit import (
    LANES,
    Expr,
    bind,
    cast,
    const,
    fma,
    function,
    intrin,
    load,
    prefetch,
    registers,
    reinterpret,
    splat,
    store,
)
from .exp import LOG2_1P, evaluate, tanh
from .isa import Isa
from .products import ByteWeights, PairProducts, Products
from .unpack import OFFSET

ROWS = 4
"""Queries that share a loaded vector of the cache. A vector of ``LANES`` has four lanes for each."""

STATE_NUMBERS = 2 * LANES
"""Numbers of a query's state before its channels: the largest score four times, and the sums of the weights."""

TILE_BLOCKS = WEIGHT_TOKENS // KEY_LANES
"""Blocks of positions between two updates of the sums."""

_TILE = TILE_BLOCKS * KEY_LANES
_SPARE = _TILE
"""Scores behind a tile's that may be computed, and are not used."""

_ROW_SCORES = _TILE + _SPARE
_LOGARITHMS = ROWS * _ROW_SCORES
_INVERSES = _LOGARITHMS + _TILE
_PEAKS = _INVERSES + _TILE
_FADES = _PEAKS + LANES
_SUMS = _FADES + 2 * LANES
_TOTALS = _SUMS + ROWS * LANES
_WEIGHTS = _TOTALS + LANES

SCRATCH_NUMBERS = _WEIGHTS + ROWS * 2 * _TILE // 4
"""Numbers of memory that the caller of ``attend`` provides: scores of a tile, what is known of its values, weights."""

NEVER = -1e30
"""The score of a position that a query does not see, and the largest score before the first."""

_NO_PEAK = -1e29
"""A largest score that no position has. Positions that are not seen are below it."""

_LEAST_SCALE, _MOST_SCALE = 67 << 23, 252 << 23
"""Of a value, as float32 stores it: 2**-60 and 2**125. A scale outside counts as the nearer one."""

_POINTERS = {
    "queries": "int8", "steps": "float32", "sums": "int32", "spans": "int32", "keys": "uint8", "key_scales": "float32",
    "values": "uint8", "value_scales": "float32", "caps": "float32", "state": "float32", "scratch": "float32",
}  # fmt: skip


def number_bytes(isa: Isa) -> int:
    """Bytes of a rounded query's number, and of a rounded weight, in memory.

    Args:
        isa: instruction set.
    """
    return 2 if isa.pair_products else 1


class _Tile(NamedTuple):
    """``blocks`` blocks from ``first`` on, of the whole cache."""

    first: Expr
    blocks: Expr


class _Row(NamedTuple):
    """A query. row: which; state: where its state begins; at: which of the rows that are computed together."""

    row: Expr
    state: Expr
    at: int


class _Side(NamedTuple):
    """How queries are multiplied with keys, or weights with values.

    products: (rows, vectors) -> their sums. missing: what products count each code too high; 0 if codes are signed.
    """

    products: Callable[[int, int], Products]
    missing: int


def _sides(isa: Isa) -> tuple[_Side, _Side]:
    """That of queries and that of weights."""
    most = 2 * OFFSET - 1
    if isa.pair_products:
        pairs = _Side(lambda rows, vectors: PairProducts(isa, rows, 2, vectors, most), OFFSET)
        return pairs, pairs
    return (
        _Side(lambda rows, vectors: Products(isa, rows, 1, vectors, most), OFFSET - Products.offset(isa, most)),
        _Side(lambda rows, vectors: ByteWeights(isa, rows, vectors), isa.value_missing),
    )


def attend(isa: Isa, name: str) -> None:
    """Kernel: brings the states of queries up to date with blocks begin .. end - 1 of a head's cache.

    Kernel arguments: queries int8 [rows, number_bytes * head_dim], steps float32 [rows], sums int32 [rows], as
    ``spread.round_queries`` makes them, where the steps have the factor of the scores; spans int32 [rows, 2], the first
    and the last position that a query sees, rising with the rows; keys and key_scales, both the address of the head's
    keys; values and value_scales, both that of its values; caps float32 [2], the soft cap of the scores and its
    inverse, 0 for none; state float32 [rows, STATE_NUMBERS + head_dim]: the largest score in the first four numbers,
    then 16 sums of weights, then the weighted values, both times ``WEIGHT_STEPS``; scratch float32 [SCRATCH_NUMBERS];
    head_dim, a multiple of 16; rows, up to ``ROWS`` or a multiple of it; begin; end.

    Args:
        isa: instruction set.
        name: the function's symbol.
    """
    with function(name, _POINTERS, ("head_dim", "rows", "begin", "end")) as args:
        work = _Attend(isa, *args)
        with T.serial(0, (work.end - work.begin + (TILE_BLOCKS - 1)) // TILE_BLOCKS) as i:
            first = bind(work.begin + i * TILE_BLOCKS)
            tile = _Tile(first, bind(T.min(work.end - first, T.int64(TILE_BLOCKS))))
            work.describe(tile)
            for count in range(1, ROWS + 1):
                with T.If(work.rows == T.int64(count)), T.Then():
                    work.score(tile, T.int64(0), count)
                    work.round(tile, T.int64(0), count)
                    work.add_values(tile, T.int64(0), count)
            with T.If(work.rows > T.int64(ROWS)), T.Then():
                work.update_many(tile)


def merge(isa: Isa, name: str) -> None:
    """Kernel: adds states of queries over some positions to those over others.

    Kernel arguments: sums float32 [rows, STATE_NUMBERS + head_dim], as ``attend`` makes them; more, of the same shape,
    which are added; head_dim; rows.

    Args:
        isa: instruction set.
        name: the function's symbol.
    """
    pointers = {"sums": "float32", "more": "float32"}
    with (
        function(name, pointers, ("head_dim", "rows")) as (sums, more, head_dim, rows),
        T.serial(0, rows) as row,
    ):
        at = bind(row * (head_dim + STATE_NUMBERS))
        before, now = (load(side, at, 1) for side in (sums, more))
        after = bind(T.max(before, now))
        both = bind(T.Shuffle([before, now] * (LANES // 2), list(range(LANES))))
        fades = isa.exp2(bind(both - splat(after, LANES)))
        kept, added = (bind(T.Shuffle([fades], [side] * LANES)) for side in range(2))
        store(sums, at, 4, splat(after, 4))
        with T.serial(1, head_dim // LANES + STATE_NUMBERS // LANES) as i:
            place = bind(at + i * LANES)
            store(sums, place, LANES, fma(load(more, place, LANES), added, load(sums, place, LANES) * kept))


class _Attend:
    """Writes the kernel. The arguments are those of the kernel."""

    def __init__(self, isa: Isa, *args: Any) -> None:
        self.isa = isa
        (
            self.queries, self.steps, self.sums, self.spans, self.keys, self.key_scales, self.values,
            self.value_scales, self.caps, self.state, self.scratch, self.head_dim, self.rows, self.begin, self.end,
        ) = args  # fmt: skip
        # Of a block: its scales, then its bytes.
        self.block_bytes = bind((self.head_dim + KV_SCALE_BYTES) * KEY_LANES)
        self.width = bind(self.head_dim + STATE_NUMBERS)
        self.ahead_bytes = isa.prefetch_bytes
        self.bytes = number_bytes(isa)
        self.query_side, self.value_side = _sides(isa)
        self.totals = T.decl_buffer((1 << 40,), "int32", data=self.scratch.data)
        self.weights = T.decl_buffer((1 << 40,), "int8", data=T.handle_add_byte_offset(self.scratch.data, 4 * _WEIGHTS))

    def _together(self, count: int, most: int) -> int:
        """How many vectors of the cache are multiplied together: a power of two, up to ``most``."""
        together = 1
        while 2 * together * count <= self.isa.attention_sums and 2 * together <= most:
            together *= 2
        return together

    def _stored(self, cache: Any, at: Expr, side: _Side) -> Expr:
        """A vector of a cache, as products take it."""
        if self.ahead_bytes:
            prefetch(cache, at + self.ahead_bytes)
        stored = load(cache, at, self.isa.vector_bytes)
        return stored if side.missing else bind(stored ^ self.isa.mask(OFFSET))

    def _scales(self, scales: Any, block: Expr, lane: Expr | int, lanes: int) -> Expr:
        return load(scales, block * (self.block_bytes // KV_SCALE_BYTES) + lane, lanes)

    def describe(self, tile: _Tile) -> None:
        """Write logarithms and inverses of the scales of a tile's values."""

        def whole(value: int) -> Expr:
            return const(value, "int32", LANES)

        with T.serial(0, tile.blocks) as block:
            # A scale that was never written may be anything. These numbers are finite.
            stored = reinterpret(self._scales(self.value_scales, tile.first + block, 0, KEY_LANES), "int32", LANES)
            bits = bind(T.max(T.min(stored, whole(_MOST_SCALE)), whole(_LEAST_SCALE)))
            exponent = cast((bits >> whole(23)) - whole(126), "float32", LANES)
            mantissa = reinterpret((bits & whole((1 << 23) - 1)) | whole(126 << 23), "float32", LANES)
            at, one = bind(block * KEY_LANES), const(1, "float32", LANES)
            logarithm = evaluate(LOG2_1P, bind(mantissa - one), LANES) + exponent
            store(self.scratch, _LOGARITHMS + at, LANES, logarithm)
            store(self.scratch, _INVERSES + at, LANES, one / reinterpret(bits, "float32", LANES))

    def update_many(self, tile: _Tile) -> None:
        """Bring all rows up to date with a tile.

        Between the scores of some rows and their weights come the values of the rows before. So none of them waits.
        """
        self.ahead_bytes = 0
        turns = bind(self.rows // ROWS)
        with T.serial(0, turns + 1) as turn:
            row = bind(turn * ROWS)
            with T.If(turn < turns), T.Then():
                self.score(tile, row, ROWS)
            with T.If(turn > T.int64(0)), T.Then():
                self.add_values(tile, bind(row - ROWS), ROWS)
            with T.If(turn < turns), T.Then():
                self.round(tile, row, ROWS)

    def _rows(self, row: Expr, count: int) -> list[_Row]:
        return [_Row(bind(row + r), bind((row + r) * self.width), r) for r in range(count)]

    def _if_whole(self, tile: _Tile, rows: list[_Row], then: Callable[[bool], None]) -> None:
        """then: writes code for a tile of ``TILE_BLOCKS`` blocks that all rows see in full, or for any tile."""
        # Spans rise, so all rows see what the first and the last one see.
        lowest, highest = load(self.spans, rows[-1].row * 2, 1), load(self.spans, rows[0].row * 2 + 1, 1)
        begins = bind(cast(tile.first * KEY_LANES, "int32", 1))
        seen = bind(T.And(lowest <= begins, highest >= begins + T.int32(_TILE - 1)))
        with T.If(T.And(seen, tile.blocks == T.int64(TILE_BLOCKS))):
            with T.Then():
                then(True)
            with T.Else():
                then(False)

    def score(self, tile: _Tile, row: Expr, count: int) -> None:
        """Write the scores of ``count`` rows from ``row`` on, and the largest ones."""
        rows = self._rows(row, count)

        def then(whole: bool) -> None:
            self._scores(tile, rows, whole=whole)
            store(self.scratch, _PEAKS, LANES, self._peaks(tile, rows, whole=whole))

        self._if_whole(tile, rows, then)

    def round(self, tile: _Tile, row: Expr, count: int) -> None:
        """Write the rounded weights of rows whose scores are there. Bring largest scores up to date."""
        rows = self._rows(row, count)
        peaks = load(self.scratch, _PEAKS, LANES)
        zeros = bind(peaks - const(math.log2(WEIGHT_STEPS), "float32", LANES))

        def then(whole: bool) -> None:
            for of in rows:
                self._round(tile, of, bind(T.Shuffle([zeros], [4 * of.at] * LANES)), whole=whole)

        self._if_whole(tile, rows, then)
        self._fade(rows, peaks)

    def _multiply(
        self, side: _Side, steps: Expr, codes: Callable[[Expr, int, int], Expr], q: Any, runs: list[list[Expr]],
        bases: list[Expr], vectors: int,
    ) -> list[list[Expr]]:  # fmt: skip
        """int32 [row][vector]: products with ``steps`` times 16 numbers of ``q``, on top of ``bases``.

        codes: (step, quarter, vector) -> stored bytes; runs: of each row, where its runs begin.
        """
        lanes = self.isa.rows
        kept = [[registers(lanes, "int32") for _ in range(vectors)] for _ in runs]
        for row, base in zip(kept, bases, strict=True):
            for sums in row:
                store(sums, 0, lanes, splat(base, lanes))
        with T.serial(0, steps) as step:
            products = side.products(len(runs), vectors)
            products.begin([[load(sums, 0, lanes) for sums in row] for row in kept])
            starts = [bind(run + step * 16) for row in runs for run in row]
            products.add(lambda j, v: codes(step, j, v), q, starts)
            for row, found in zip(kept, products.sums_so_far(), strict=True):
                for sums, value in zip(row, found, strict=True):
                    store(sums, 0, lanes, value)
        return [[load(sums, 0, lanes) for sums in row] for row in kept]

    def _scores(self, tile: _Tile, rows: list[_Row], *, whole: bool) -> None:
        """Write the scores of a tile, with the logarithms of its values' scales."""
        isa, side = self.isa, self.query_side
        together = self._together(len(rows), TILE_BLOCKS * isa.vectors)
        count = bind(T.int64(TILE_BLOCKS * isa.vectors) if whole else tile.blocks * isa.vectors)
        runs = [[bind((of.row * self.bytes + byte) * self.head_dim) for byte in range(self.bytes)] for of in rows]
        bases = [bind(load(self.sums, of.row, 1) * T.int32(-side.missing)) for of in rows]
        with T.serial(0, (count + (together - 1)) // together) as i:
            vector = bind(i * together)
            # The last may be computed again.
            held = [bind(vector + v if whole else T.min(vector + v, count - 1)) for v in range(together)]
            blocks = [bind(tile.first + place // isa.vectors) for place in held]
            lanes = [bind(place % isa.vectors * isa.rows) for place in held]
            places = [
                bind(block * self.block_bytes + (KV_SCALE_BYTES * KEY_LANES) + lane * 4)
                for block, lane in zip(blocks, lanes, strict=True)
            ]

            def codes(step: Expr, j: int, v: int) -> Expr:
                return self._stored(self.keys, places[v] + (step * 4 + j) * (4 * KEY_LANES), side)

            dots = self._multiply(side, self.head_dim // 16, codes, self.queries, runs, bases, together)
            for v in range(together):
                scales = self._scales(self.key_scales, blocks[v], lanes[v], isa.rows)
                logarithms = load(self.scratch, _LOGARITHMS + held[v] * isa.rows, isa.rows)
                for of, of_row in zip(rows, dots, strict=True):
                    score = bind(cast(of_row[v], "float32", isa.rows) * scales)
                    step = splat(load(self.steps, of.row, 1), isa.rows)
                    at = bind(of.at * _ROW_SCORES + (vector + v) * isa.rows)
                    store(self.scratch, at, isa.rows, fma(score, step, logarithms))
        with T.If(load(self.caps, 0, 1) > const(0, "float32")), T.Then():
            for of in rows:
                self._cap(tile, of)
        if not whole:
            for of in rows:
                self._hide(tile, of)

    def _cap(self, tile: _Tile, of: _Row) -> None:
        cap, inverse = (splat(load(self.caps, side, 1), LANES) for side in (0, 1))
        with T.serial(0, tile.blocks) as block:
            at = bind(block * KEY_LANES)
            logarithm = load(self.scratch, _LOGARITHMS + at, LANES)
            score = bind((load(self.scratch, of.at * _ROW_SCORES + at, LANES) - logarithm) * inverse)
            store(self.scratch, of.at * _ROW_SCORES + at, LANES, fma(tanh(score, LANES), cap, logarithm))

    def _hide(self, tile: _Tile, of: _Row) -> None:
        """Replace the scores of positions that a row does not see."""
        low, high = (load(self.spans, of.row * 2 + side, 1) for side in (0, 1))
        with T.serial(0, tile.blocks) as block:
            at = bind(of.at * _ROW_SCORES + block * KEY_LANES)
            begins = bind(cast((tile.first + block) * KEY_LANES, "int32", 1))
            positions = bind(T.ramp(begins, 1, KEY_LANES))
            never = const(NEVER, "float32", LANES)
            score = bind(T.Select(positions >= splat(low, LANES), load(self.scratch, at, LANES), never))
            store(self.scratch, at, LANES, T.Select(positions <= splat(high, LANES), score, never))

    def _peaks(self, tile: _Tile, rows: list[_Row], *, whole: bool) -> Expr:
        """The largest score of each row in a tile: that of row r in lanes 4 r .. 4 r + 3."""
        of_rows = []
        for of in rows:
            scores = bind(of.at * _ROW_SCORES)
            if whole:
                some = [load(self.scratch, scores + block * KEY_LANES, LANES) for block in range(TILE_BLOCKS)]
                while len(some) > 1:
                    some = [bind(T.max(*some[i : i + 2])) for i in range(0, len(some), 2)]
                of_rows.append(some[0])
                continue
            peak = registers(LANES, "float32")
            store(peak, 0, LANES, const(_NO_PEAK, "float32", LANES))
            with T.serial(0, tile.blocks) as block:
                score = load(self.scratch, scores + block * KEY_LANES, LANES)
                store(peak, 0, LANES, T.max(load(peak, 0, LANES), score))
            of_rows.append(load(peak, 0, LANES))
        # LLVM's own maximum of a vector goes lane by lane on x86.
        a, b, c, d = (of_rows * ROWS)[:ROWS]
        pairs = [_larger(sides, [*range(8), *range(16, 24)], 8) for sides in ([a, b], [c, d])]
        fours = _larger(pairs, [lane + 8 * four for four in range(4) for lane in range(4)], 4)
        for apart in (2, 1):
            fours = bind(T.max(fours, bind(T.Shuffle([fours], [lane ^ apart for lane in range(LANES)]))))
        return bind(T.max(fours, const(_NO_PEAK, "float32", LANES)))

    def _fade(self, rows: list[_Row], peaks: Expr) -> None:
        """Bring largest scores up to date. Write what sums so far are multiplied by, and those of the tile."""
        states = [load(self.state, of.state, 4) for of in rows]
        before = bind(T.Shuffle((states * ROWS)[:ROWS], list(range(LANES))))
        after = bind(T.max(before, peaks))
        for of in rows:
            store(self.state, of.state, 4, T.Shuffle([after], list(range(4 * of.at, 4 * of.at + 4))))
        for at, side in enumerate((before, peaks)):
            store(self.scratch, _FADES + at * LANES, LANES, self.isa.exp2(bind(side - after)))

    def _round(self, tile: _Tile, of: _Row, zero: Expr, *, whole: bool) -> None:
        """Write the rounded weights of a tile and their sums."""
        missing = self.value_side.missing
        sums, counts = registers(LANES, "float32"), registers(LANES, "int32")
        store(sums, 0, LANES, const(0, "float32", LANES))
        store(counts, 0, LANES, const(0, "int32", LANES))

        def rounded(at: Expr) -> Expr:
            above = bind(load(self.scratch, of.at * _ROW_SCORES + at, LANES) - zero)
            weight = bind(self.isa.exp2(above))
            store(sums, 0, LANES, fma(weight, load(self.scratch, _INVERSES + at, LANES), load(sums, 0, LANES)))
            found = self.isa.nearest(weight)
            if missing:
                store(counts, 0, LANES, load(counts, 0, LANES) + found)
            return found

        def put(at: Expr) -> None:
            places = [bind((of.at * self.bytes + byte) * _TILE + at) for byte in range(self.bytes)]
            (store_pairs if len(places) == 2 else store_bytes)(self.weights, places, [[rounded(at)]])

        if whole and self.isa.packs:
            words = [rounded(T.int64(block * KEY_LANES)) for block in range(TILE_BLOCKS)]
            store(self.weights, of.at * _TILE, _TILE, self.isa.packed(words))
        elif whole:
            for block in range(TILE_BLOCKS):
                put(T.int64(block * KEY_LANES))
        else:
            with T.serial(0, tile.blocks) as block:
                put(bind(block * KEY_LANES))
        store(self.scratch, _SUMS + of.at * LANES, LANES, load(sums, 0, LANES))
        if missing:
            total = bind(intrin("int32", "llvm.vector.reduce.add", load(counts, 0, LANES)))
            store(self.totals, _TOTALS + of.at, 1, total * T.int32(-missing))

    def add_values(self, tile: _Tile, row: Expr, count: int) -> None:
        """Bring ``count`` rows from ``row`` on up to date with the values that ``round`` wrote weights for."""
        rows = self._rows(row, count)
        fades = [[load(self.scratch, _FADES + side * LANES + 4 * of.at, 1) for side in range(2)] for of in rows]
        for of, sides in zip(rows, fades, strict=True):
            before, now = (splat(side, LANES) for side in sides)
            so_far = load(self.state, of.state + LANES, LANES) * before
            sums = load(self.scratch, _SUMS + of.at * LANES, LANES)
            store(self.state, of.state + LANES, LANES, fma(sums, now, so_far))
        parts = bind(self.head_dim // self.isa.rows)
        together = self._together(count, 64)
        with T.serial(0, parts // together) as part:
            self._weighted(tile, rows, bind(part * together), together, fades)
        if together > 1:
            with T.serial(0, parts % together) as part:
                self._weighted(tile, rows, bind(parts - 1 - part), 1, fades)

    def _weighted(self, tile: _Tile, rows: list[_Row], part: Expr, together: int, fades: list[list[Expr]]) -> None:
        """Add the weighted values of ``together`` vectors of channels from vector ``part`` on."""
        isa, side = self.isa, self.value_side
        runs = [[T.int64((of.at * self.bytes + byte) * _TILE) for byte in range(self.bytes)] for of in rows]
        of_block = bind(tile.first * self.block_bytes + (KV_SCALE_BYTES * KEY_LANES))

        def codes(step: Expr, j: int, v: int) -> Expr:
            at = of_block + step * self.block_bytes + self.head_dim * (4 * j) + (part + v) * isa.vector_bytes
            return self._stored(self.values, at, side)

        bases = [load(self.totals, _TOTALS + of.at, 1) if side.missing else T.int32(0) for of in rows]
        dots = self._multiply(side, tile.blocks, codes, self.weights, runs, bases, together)
        for of, of_row, (before, now) in zip(rows, dots, fades, strict=True):
            for v, dot in enumerate(of_row):
                at = bind(of.state + STATE_NUMBERS + (part + v) * isa.rows)
                so_far = bind(load(self.state, at, isa.rows) * splat(before, isa.rows))
                store(self.state, at, isa.rows, fma(cast(dot, "float32", isa.rows), splat(now, isa.rows), so_far))


def _larger(sides: list[Expr], lanes: list[int], apart: int) -> Expr:
    """The larger of each of these lanes of two vectors and the lane ``apart`` further."""
    return bind(T.max(*(bind(T.Shuffle(sides, [lane + more for lane in lanes])) for more in (0, apart))))
