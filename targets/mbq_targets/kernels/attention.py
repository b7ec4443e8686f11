"""Attention of a few queries over a range of a cache of 8 bits, with an online softmax, by products of integers.

``mbq_export.format.attention`` defines the cache and the result. Scores are products of queries with stored keys, and
what a head attends to is products of weights with stored values. Both are sums of ``products``, which take queries and
weights as they take activations, and keys and values as they take weights of a matrix. The rows of a call share a head
of keys and of values.

Scores count in powers of two. A value's scale is ``mantissa * 2**exponent``, and a score gets the exponent of its
value. So the largest score of a tile tells the largest weighted value, and rounded weights use all their steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tvm.tirx.script import builder as T

from mbq_runtime.bundle.layout import KEY_LANES, KV_SCALE_BYTES

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
from .exp import tanh
from .isa import PACKED, Isa
from .products import PairProducts, Products
from .unpack import OFFSET

ROWS = 4
"""Queries that share a loaded vector of the cache."""

QUERY_BYTES = 2
"""Bytes of a rounded query."""

WEIGHT_BYTES = 2
"""Bytes of a rounded weight of a value."""

STATE_NUMBERS = 2 * LANES
"""Numbers of a query's state before its channels: the largest score, and the sums of the weights."""

TILE_BLOCKS = 16
"""Blocks of positions between two updates of the sums. The weights of these share a step."""

_TILE = TILE_BLOCKS * KEY_LANES
_SPARE = 8 * KEY_LANES
"""Scores behind a tile's that may be computed, and are not used."""

_ROW_SCORES = _TILE + _SPARE
_EXPONENTS = ROWS * _ROW_SCORES
_MANTISSAS = _EXPONENTS + _TILE
_INVERSES = _MANTISSAS + _TILE
_WEIGHTS = _INVERSES + _TILE

SCRATCH_NUMBERS = _WEIGHTS + ROWS * WEIGHT_BYTES * _TILE // 4
"""Numbers of memory that the caller of ``attend`` provides: scores of a tile, what is known of its values, weights."""

NEVER = -1e30
"""The score of a position that a query does not see, and the largest score before the first."""

_PEAKS = 4
"""Largest scores so far that take turns."""

_NO_PEAK = -1e29
"""A largest score that no position has. Positions that are not seen are below it."""

_STEPS = {1: 127, 2: 127 * 257}
"""The largest rounded weight, by its bytes."""

_LEAST_EXPONENT, _MOST_EXPONENT = 67, 252
"""Of a value's scale, as float32 stores it. A value with a smaller scale counts as zero."""

_POINTERS = {
    "queries": "int8", "steps": "float32", "sums": "int32", "spans": "int32", "keys": "uint8", "key_scales": "float32",
    "values": "uint8", "value_scales": "float32", "caps": "float32", "state": "float32", "scratch": "float32",
}  # fmt: skip


class _Tile(NamedTuple):
    """Blocks from ``first`` on, of the whole cache. begin, end: those of them that some of the rows see."""

    first: Expr
    begin: Expr
    end: Expr


class _Row(NamedTuple):
    """A query. row: which; state: where its state begins; at: which of the rows that are computed together."""

    row: Expr
    state: Expr
    at: int


def attend(isa: Isa, name: str) -> None:
    """Kernel: brings the states of queries up to date with blocks begin .. end - 1 of a head's cache.

    Kernel arguments: queries int8 [rows, QUERY_BYTES * head_dim], steps float32 [rows], sums int32 [rows], as
    ``spread.round_queries`` makes them, where the steps have the factor of the scores; spans int32 [rows, 2], the first
    and the last position that a query sees, rising with the rows; keys and key_scales, both the address of the head's
    keys; values and value_scales, both that of its values; caps float32 [2], the soft cap of the scores and its
    inverse, 0 for none; state float32 [rows, STATE_NUMBERS + head_dim]: the largest score in the first number, then 16
    sums of weights, then the weighted values; scratch float32 [SCRATCH_NUMBERS]; head_dim, a multiple of 16; rows, up
    to ``ROWS`` or a multiple of it; begin; end.

    Args:
        isa: instruction set.
        name: the function's symbol.
    """
    with function(name, _POINTERS, ("head_dim", "rows", "begin", "end")) as args:
        work = _Attend(isa, *args)
        with T.serial(0, (work.end - work.begin + (TILE_BLOCKS - 1)) // TILE_BLOCKS) as i:
            first = bind(work.begin + i * TILE_BLOCKS)
            blocks = bind(T.min(work.end - first, T.int64(TILE_BLOCKS)))
            work.take_apart(first, blocks)
            for count in range(1, ROWS):
                with T.If(work.rows == T.int64(count)), T.Then():
                    work.update(T.int64(0), count, first, blocks)
            with T.If(work.rows >= T.int64(ROWS)), T.Then():
                work.update(T.int64(0), ROWS, first, blocks)
                # The tile is now in the caches of the core.
                work.ahead_bytes = 0
                with T.serial(1, work.rows // ROWS) as turn:
                    work.update(bind(turn * ROWS), ROWS, first, blocks)


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
        self.weights = T.decl_buffer((1 << 40,), "int8", data=T.handle_add_byte_offset(self.scratch.data, 4 * _WEIGHTS))

    def _kind(self, width: int) -> type[Products]:
        return PairProducts if self.isa.pairs(width) else Products

    def _together(self, count: int, width: int, most: int) -> int:
        """How many vectors of the cache are multiplied together: a power of two, up to ``most``."""
        runs = count if self.isa.pairs(width) else count * width
        together = 1
        while 2 * together * runs <= self.isa.attention_sums and 2 * together <= most:
            together *= 2
        return together

    def _missing(self, width: int) -> int:
        """What products of stored bytes count each code too high."""
        return OFFSET - self._kind(width).offset(self.isa, 2 * OFFSET - 1)

    def _stored(self, cache: Any, at: Expr, width: int) -> Expr:
        """A vector of a cache, as products take it."""
        if self.ahead_bytes:
            prefetch(cache, at + self.ahead_bytes)
        stored = load(cache, at, self.isa.vector_bytes)
        return stored if self._missing(width) else bind(stored ^ self.isa.mask(OFFSET))

    def _scales(self, scales: Any, block: Expr, lane: Expr | int, lanes: int) -> Expr:
        return load(scales, block * (self.block_bytes // KV_SCALE_BYTES) + lane, lanes)

    def take_apart(self, first: Expr, blocks: Expr) -> None:
        """Write exponents, mantissas and inverse powers of the scales of a tile's values."""
        with T.serial(0, blocks) as block:
            bits = bind(reinterpret(self._scales(self.value_scales, first + block, 0, KEY_LANES), "int32", LANES))

            def whole(value: int) -> Expr:
                return const(value, "int32", LANES)

            stored = bind((bits >> whole(23)) & whole(255))
            exponent = bind(T.max(T.min(stored, whole(_MOST_EXPONENT)), whole(_LEAST_EXPONENT)))
            # A scale that was never written may be anything. These numbers are finite.
            mantissa = reinterpret((bits & whole((1 << 23) - 1)) | whole(126 << 23), "float32", LANES)
            at = bind(block * KEY_LANES)
            store(self.scratch, _EXPONENTS + at, LANES, cast(exponent - whole(126), "float32", LANES))
            step = T.Select(
                stored >= whole(_LEAST_EXPONENT),
                mantissa * const(_STEPS[WEIGHT_BYTES], "float32", LANES),
                const(0, "float32", LANES),
            )
            store(self.scratch, _MANTISSAS + at, LANES, step)
            inverse = reinterpret((whole(253) - exponent) << whole(23), "float32", LANES)
            store(self.scratch, _INVERSES + at, LANES, inverse)

    def update(self, row: Expr, count: int, first: Expr, blocks: Expr) -> None:
        """Bring ``count`` rows from ``row`` on up to date with a tile."""
        lowest, highest = load(self.spans, row * 2, 1), load(self.spans, (row + (count - 1)) * 2 + 1, 1)

        def seen(position: Expr, more: int) -> Expr:
            block = cast(position >> T.int32(KEY_LANES.bit_length() - 1), "int64", 1) + more - first
            return bind(T.max(T.min(block, blocks), T.int64(0)))

        tile = _Tile(first, seen(lowest, 0), seen(highest, 1))
        with T.If(tile.begin < tile.end), T.Then():
            rows = [_Row(bind(row + r), bind((row + r) * self.width), r) for r in range(count)]
            self._scores(tile, rows)
            fades = [self._weigh(tile, of_row) for of_row in rows]
            parts = bind(self.head_dim // self.isa.rows)
            together = self._together(count, WEIGHT_BYTES, 64)
            with T.serial(0, parts // together) as part:
                self._weighted(tile, rows, bind(part * together), together, fades)
            if together > 1:
                with T.serial(0, parts % together) as part:
                    self._weighted(tile, rows, bind(parts - 1 - part), 1, fades)

    def _multiply(
        self, width: int, steps: Expr, codes: Callable[[Expr, int, int], Expr], q: Any, runs: list[list[Expr]],
        bases: list[Expr], vectors: int,
    ) -> list[list[Expr]]:  # fmt: skip
        """int32 [row][vector]: products with ``steps`` times 16 numbers of ``q``, on top of ``bases``.

        width: bytes of these numbers; codes: (step, quarter, vector) -> stored bytes; runs: of each row, where its runs
        begin.
        """
        isa, kind = self.isa, self._kind(width)
        per_row = 1 if isa.pairs(width) else width
        kept = [[registers(isa.rows, "int32") for _ in range(vectors)] for _ in range(len(runs) * per_row)]
        for at, of_run in enumerate(kept):
            low, base = at % per_row == per_row - 1, bases[at // per_row]
            for sums in of_run:
                store(sums, 0, isa.rows, splat(base if low else T.int32(0), isa.rows))

        def so_far() -> list[list[Expr]]:
            return [[load(sums, 0, isa.rows) for sums in of_run] for of_run in kept]

        with T.serial(0, steps) as step:
            products = kind(isa, len(runs), width, vectors, 2 * OFFSET - 1)
            products.begin(so_far())
            starts = [bind(run + step * 16) for of_row in runs for run in of_row]
            products.add(lambda j, v: codes(step, j, v), q, starts)
            for of_run, found in zip(kept, products.sums_so_far(), strict=True):
                for sums, value in zip(of_run, found, strict=True):
                    store(sums, 0, isa.rows, value)
        return kind(isa, len(runs), width, vectors, 2 * OFFSET - 1).joined(so_far())

    def _scores(self, tile: _Tile, rows: list[_Row]) -> None:
        """Write the scores of a tile, with the exponents of its values."""
        isa = self.isa
        together = self._together(len(rows), QUERY_BYTES, _SPARE // isa.rows)
        last = bind(tile.end * isa.vectors - 1)
        runs = [[bind((of.row * QUERY_BYTES + byte) * self.head_dim) for byte in range(QUERY_BYTES)] for of in rows]
        missing = self._missing(QUERY_BYTES)
        bases = [bind(load(self.sums, of.row, 1) * T.int32(-missing)) for of in rows]
        with T.serial(0, (last + together - tile.begin * isa.vectors) // together) as i:
            vector = bind(tile.begin * isa.vectors + i * together)
            held = [bind(T.min(vector + v, last)) for v in range(together)]  # the last may be computed again
            blocks = [bind(tile.first + place // isa.vectors) for place in held]
            lanes = [bind(place % isa.vectors * isa.rows) for place in held]
            places = [
                bind(block * self.block_bytes + (KV_SCALE_BYTES * KEY_LANES) + lane * 4)
                for block, lane in zip(blocks, lanes, strict=True)
            ]

            def codes(step: Expr, j: int, v: int) -> Expr:
                return self._stored(self.keys, places[v] + (step * 4 + j) * (4 * KEY_LANES), QUERY_BYTES)

            dots = self._multiply(QUERY_BYTES, self.head_dim // 16, codes, self.queries, runs, bases, together)
            for v in range(together):
                scales = self._scales(self.key_scales, blocks[v], lanes[v], isa.rows)
                exponents = load(self.scratch, _EXPONENTS + held[v] * isa.rows, isa.rows)
                for of, of_row in zip(rows, dots, strict=True):
                    score = bind(cast(of_row[v], "float32", isa.rows) * scales)
                    step = splat(load(self.steps, of.row, 1), isa.rows)
                    at = bind(of.at * _ROW_SCORES + (vector + v) * isa.rows)
                    store(self.scratch, at, isa.rows, fma(score, step, exponents))
        for of in rows:
            self._cap(tile, of)
            self._hide(tile, of)

    def _cap(self, tile: _Tile, of: _Row) -> None:
        with T.If(load(self.caps, 0, 1) > const(0, "float32")), T.Then():
            cap, inverse = (splat(load(self.caps, side, 1), LANES) for side in (0, 1))
            with T.serial(0, tile.end - tile.begin) as i:
                at = bind((tile.begin + i) * KEY_LANES)
                exponent = load(self.scratch, _EXPONENTS + at, LANES)
                score = bind((load(self.scratch, of.at * _ROW_SCORES + at, LANES) - exponent) * inverse)
                store(self.scratch, of.at * _ROW_SCORES + at, LANES, fma(tanh(score, LANES), cap, exponent))

    def _hide(self, tile: _Tile, of: _Row) -> None:
        """Replace the scores of positions that a row does not see."""
        low, high = (load(self.spans, of.row * 2 + side, 1) for side in (0, 1))
        begins = bind(cast((tile.first + tile.begin) * KEY_LANES, "int32", 1))
        ends = bind(cast((tile.first + tile.end) * KEY_LANES, "int32", 1))
        with (
            T.If(T.Or(low > begins, high < ends - T.int32(1))),
            T.Then(),
            T.serial(0, tile.end - tile.begin) as i,
        ):
            at = bind(of.at * _ROW_SCORES + (tile.begin + i) * KEY_LANES)
            positions = bind(T.ramp(begins + cast(i * KEY_LANES, "int32", 1), 1, KEY_LANES))
            never = const(NEVER, "float32", LANES)
            score = bind(T.Select(positions >= splat(low, LANES), load(self.scratch, at, LANES), never))
            store(self.scratch, at, LANES, T.Select(positions <= splat(high, LANES), score, never))

    def _weigh(self, tile: _Tile, of: _Row) -> tuple[Any, Any]:
        """Write the weights of a tile, and bring the row's largest score and its sums up to date.

        Returns:
            What the sums so far are multiplied by and what those of the tile are, and the base of these.
        """
        blocks = bind(tile.end - tile.begin)
        scores = bind(of.at * _ROW_SCORES + tile.begin * KEY_LANES)
        peak, sums = registers(LANES, "float32"), registers(LANES, "float32")
        fades, total = registers(2, "float32"), registers(1, "int32")
        # Several, so that a maximum does not wait for the one before. The last block may be seen again.
        peaks = [registers(LANES, "float32") for _ in range(_PEAKS)]
        for some in peaks:
            store(some, 0, LANES, const(_NO_PEAK, "float32", LANES))
        with T.serial(0, (blocks + (_PEAKS - 1)) // _PEAKS) as i:
            for part, some in enumerate(peaks):
                block = bind(T.min(i * _PEAKS + part, blocks - 1))
                score = load(self.scratch, scores + block * KEY_LANES, LANES)
                store(some, 0, LANES, T.max(load(some, 0, LANES), score))
        highest = load(peaks[0], 0, LANES)
        for some in peaks[1:]:
            highest = bind(T.max(highest, load(some, 0, LANES)))
        # LLVM's own maximum of a vector goes lane by lane on x86.
        half = LANES // 2
        while half:
            highest = bind(T.max(highest, bind(T.Shuffle([highest], [lane ^ half for lane in range(LANES)]))))
            half //= 2
        store(peak, 0, LANES, highest)
        store(sums, 0, LANES, const(0, "float32", LANES))
        self._round(tile, of, load(peak, 0, LANES), sums, total)
        before, now = load(self.state, of.state, 1), load(peak, 0, 1)
        after = bind(T.max(before, now))
        store(self.state, of.state, 1, after)
        both = T.Shuffle([before, now] * (LANES // 2), list(range(LANES)))
        store(peak, 0, LANES, self.isa.exp2(bind(both - splat(after, LANES))))
        for side in range(2):
            store(fades, side, 1, load(peak, side, 1))
        so_far = load(self.state, of.state + LANES, LANES) * splat(load(fades, 0, 1), LANES)
        store(self.state, of.state + LANES, LANES, fma(load(sums, 0, LANES), splat(load(fades, 1, 1), LANES), so_far))
        return fades, total

    def _round(self, tile: _Tile, of: _Row, peak: Expr, sums: Any, total: Any) -> None:
        """Write the rounded weights of a tile. sums: gets the weights; total: gets the base of their products."""
        missing = self._missing(WEIGHT_BYTES)
        weight, whole = registers(LANES, "float32"), registers(LANES, "int32")
        store(whole, 0, LANES, const(0, "int32", LANES))

        def rounded(at: Expr) -> Expr:
            below = bind(load(self.scratch, of.at * _ROW_SCORES + at, LANES) - peak)
            store(weight, 0, LANES, self.isa.exp2(below))
            inverses, steps = (load(self.scratch, place + at, LANES) for place in (_INVERSES, _MANTISSAS))
            store(sums, 0, LANES, fma(load(weight, 0, LANES), inverses, load(sums, 0, LANES)))
            nearest = fma(load(weight, 0, LANES), steps, const(0.5, "float32", LANES))
            found = bind(cast(nearest, "int32", LANES))
            if missing:
                store(whole, 0, LANES, load(whole, 0, LANES) + found)
            return found

        def places(at: Expr) -> list[Expr]:
            return [bind((of.at * WEIGHT_BYTES + byte) * _TILE + at) for byte in range(WEIGHT_BYTES)]

        count = bind(tile.end - tile.begin)
        packed = bind(count // PACKED * PACKED) if self.isa.packs else T.int64(0)
        if self.isa.packs:
            with T.serial(0, packed // PACKED) as i:
                at = bind((tile.begin + i * PACKED) * KEY_LANES)
                words = [rounded(at + block * KEY_LANES) for block in range(PACKED)]
                for place, of_byte in zip(places(at), self.isa.packed(words), strict=True):
                    store(self.weights, place, PACKED * LANES, of_byte)
        with T.serial(packed, count) as i:
            at = bind((tile.begin + i) * KEY_LANES)
            word = rounded(at)
            if self.isa.pairs(WEIGHT_BYTES):
                store_pairs(self.weights, places(at), [[word]])
            elif WEIGHT_BYTES == 1:
                store_bytes(self.weights, places(at), [[word]])
            else:
                high = bind((word + const(128, "int32", LANES)) >> const(8, "int32", LANES))
                store_bytes(self.weights, places(at), [[high, word]])
        of_all = intrin("int32", "llvm.vector.reduce.add", load(whole, 0, LANES))
        store(total, 0, 1, bind(of_all) * T.int32(-missing))

    def _weighted(self, tile: _Tile, rows: list[_Row], part: Expr, together: int, fades: list[tuple[Any, Any]]) -> None:
        """Add the weighted values of ``together`` vectors of channels from vector ``part`` on."""
        isa = self.isa
        begin = bind(tile.begin * KEY_LANES)
        runs = [[bind((of.at * WEIGHT_BYTES + byte) * _TILE + begin) for byte in range(WEIGHT_BYTES)] for of in rows]
        of_block = bind((tile.first + tile.begin) * self.block_bytes + (KV_SCALE_BYTES * KEY_LANES))

        def codes(step: Expr, j: int, v: int) -> Expr:
            at = of_block + step * self.block_bytes + self.head_dim * (4 * j) + (part + v) * isa.vector_bytes
            return self._stored(self.values, at, WEIGHT_BYTES)

        bases = [load(total, 0, 1) for _, total in fades]
        dots = self._multiply(WEIGHT_BYTES, tile.end - tile.begin, codes, self.weights, runs, bases, together)
        for of, of_row, (fade, _) in zip(rows, dots, fades, strict=True):
            unit = bind(load(fade, 1, 1) * const(1 / _STEPS[WEIGHT_BYTES], "float32"))
            for v, dot in enumerate(of_row):
                at = bind(of.state + STATE_NUMBERS + (part + v) * isa.rows)
                so_far = bind(load(self.state, at, isa.rows) * splat(load(fade, 0, 1), isa.rows))
                store(self.state, at, isa.rows, fma(cast(dot, "float32", isa.rows), splat(unit, isa.rows), so_far))
