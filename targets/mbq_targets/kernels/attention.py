"""Attention of a few queries over a range of a cache of 8 bits, with an online softmax.

``mbq_export.format.attention`` defines the cache and the result. Up to ``ROWS`` queries read the codes of the cache as
they are. More queries share tiles of it that are expanded to float32 first. The rows of a call share a head of keys and
of values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from mbq_runtime.bundle.layout import KEY_LANES, KV_SCALE_BYTES

from .emit import LANES, Expr, bind, cast, const, fma, function, intrin, load, registers, splat, store
from .exp import exp, tanh
from .isa import Isa

ROWS = 4
"""Queries that share a loaded vector of the cache."""

STATE_NUMBERS = 2 * LANES
"""Numbers of a query's state before its channels: the largest score, and the sums of the weights."""

TILE_BLOCKS = 4
"""Blocks of positions of an expanded tile."""

_BLOCKS = 4
"""Blocks of positions between two updates of the sums, where codes are read as they are."""

_SUMS = 12
"""Registers for sums that take turns, which hides the latency of a multiply-add."""

NEVER = -1e30
"""The score of a position that a query does not see, and the largest score before the first."""

_POINTERS = {
    "queries": "float32", "spans": "int32", "keys": "int8", "key_scales": "float32", "values": "int8",
    "value_scales": "float32", "caps": "float32", "state": "float32", "tiles": "float32",
}  # fmt: skip


@dataclass(frozen=True)
class _Source:
    """Where vectors of a cache come from.

    count: queries that are computed together; blocks: of positions between two updates; keys: (block, channel) ->
    float32 of 16 positions; values: (block, position, channel) -> float32 of 16 channels, without their scales;
    value_scales: (block) -> these scales of 16 positions; key_scales: the same, None where they are in the vectors.
    """

    count: int
    blocks: int
    keys: Callable[[Expr, Expr], Expr]
    values: Callable[[Expr, int, Expr], Expr]
    value_scales: Callable[[Expr], Expr]
    key_scales: Callable[[Expr], Expr] | None = None


def attend(isa: Isa, name: str) -> None:
    """Kernel: brings the states of queries up to date with blocks begin .. end - 1 of a head's cache.

    Kernel arguments: queries float32 [rows, head_dim], already scaled; spans int32 [rows, 2], the first and the last
    position that a query sees, rising with the rows; keys and key_scales, both the address of the head's keys; values
    and value_scales, both that of its values; caps float32 [2], the soft cap of the scores and its inverse, 0 for none;
    state float32 [rows, STATE_NUMBERS + head_dim]: the largest score in the first number, then 16 sums of weights, then
    the weighted values; tiles float32 [2 * TILE_BLOCKS * 16 * head_dim], only for more than ``ROWS`` rows; head_dim, a
    multiple of 16; rows, up to ``ROWS`` or a multiple of it; begin; end.

    Args:
        isa: instruction set.
        name: the function's symbol.
    """
    with function(name, _POINTERS, ("head_dim", "rows", "begin", "end")) as args:
        work = _Attend(isa, *args)
        for count in range(1, ROWS + 1):
            with T.If(work.rows == T.int64(count)), T.Then():
                work.direct(count)
        with T.If(work.rows > T.int64(ROWS)), T.Then():
            work.tiled()


class _Attend:
    """Writes the kernel. The arguments are those of the kernel."""

    def __init__(self, isa: Isa, *args: Any) -> None:
        self.isa = isa
        (
            self.queries, self.spans, self.keys, self.key_scales, self.values, self.value_scales, self.caps, self.state,
            self.tiles, self.head_dim, self.rows, self.begin, self.end,
        ) = args  # fmt: skip
        # Of a block: its scales, then its codes.
        self.block_bytes = bind((self.head_dim + KV_SCALE_BYTES) * KEY_LANES)
        self.width = bind(self.head_dim + STATE_NUMBERS)
        self.parts = bind(self.head_dim // LANES)
        # Vectors of the cache that share a loaded number of a query.
        self.together = 1

    def direct(self, count: int) -> None:
        """All rows, from the codes."""
        with T.serial(0, (self.end - self.begin + (_BLOCKS - 1)) // _BLOCKS) as i:
            first = bind(self.begin + i * _BLOCKS)

            def held(block: Expr) -> Expr:
                """The last block may be computed twice. Its second scores are not seen."""
                return T.min(first + block, self.end - 1)

            def keys(block: Expr, d: Expr) -> Expr:
                return self._codes(self.keys, held(block), d * KEY_LANES)

            def values(block: Expr, j: int, d: Expr) -> Expr:
                return self._codes(self.values, first + block, self.head_dim * j + d)

            source = _Source(
                count, _BLOCKS, keys, values,
                lambda block: self._scales(self.value_scales, first + block),
                lambda block: self._scales(self.key_scales, held(block)),
            )  # fmt: skip
            self._update(source, T.int64(0), first)

    def tiled(self) -> None:
        """All rows, ROWS at a time, from tiles in float32."""
        lanes = TILE_BLOCKS * KEY_LANES
        # Others have no registers for two. Codes from memory are read faster one by one, see docs/log.md.
        self.together = 2 if self.isa.vector_bytes == 4 * LANES else 1
        of_values = bind(self.head_dim * lanes)
        with T.serial(0, (self.end - self.begin + (TILE_BLOCKS - 1)) // TILE_BLOCKS) as i:
            first = bind(self.begin + i * TILE_BLOCKS)
            source = _Source(
                ROWS, TILE_BLOCKS,
                lambda block, d: load(self.tiles, d * lanes + block * KEY_LANES, KEY_LANES),
                lambda block, j, d: load(self.tiles, of_values + (block * KEY_LANES + j) * self.head_dim + d, LANES),
                lambda block: self._scales(self.value_scales, first + block),
            )  # fmt: skip
            count = bind(T.min(self.end - first, T.int64(TILE_BLOCKS)))
            with T.serial(0, count) as block:
                scales = self._scales(self.key_scales, first + block)
                with T.serial(0, self.head_dim) as d:
                    key = self._codes(self.keys, first + block, d * KEY_LANES) * scales
                    store(self.tiles, d * lanes + block * KEY_LANES, KEY_LANES, key)
                with T.serial(0, self.head_dim) as part:  # of all positions, one behind the other
                    value = self._codes(self.values, first + block, part * LANES)
                    store(self.tiles, of_values + block * (KEY_LANES * self.head_dim) + part * LANES, LANES, value)
            with T.serial(0, self.rows // ROWS) as turn:
                row = bind(turn * ROWS)
                lowest, highest = load(self.spans, row * 2, 1), load(self.spans, (row + (ROWS - 1)) * 2 + 1, 1)
                begins = cast(first * KEY_LANES, "int32", 1)
                with T.If(T.And(begins <= highest, begins + lanes > lowest)), T.Then():
                    self._update(source, row, first)

    def _scales(self, scales: Any, block: Expr) -> Expr:
        return load(scales, block * (self.block_bytes // KV_SCALE_BYTES), KEY_LANES)

    def _codes(self, codes: Any, block: Expr, place: Expr) -> Expr:
        """16 codes of a block as float32. place: of the first, behind the block's scales."""
        at = block * self.block_bytes + (KV_SCALE_BYTES * KEY_LANES) + place
        return bind(cast(load(codes, at, LANES), "float32", LANES))

    def _chains(self, sums: int) -> int:
        """How many sums take turns. sums: of 16 numbers each, that do not depend on each other."""
        most = _SUMS // (sums * 4 * LANES // self.isa.vector_bytes)
        return 4 if most >= 4 else 2 if most >= 2 else 1

    def _update(self, source: _Source, row: Expr, first: Expr) -> None:
        """Bring rows row .. row + count - 1 up to date with the blocks from ``first`` on."""
        rows = [bind(row + r) for r in range(source.count)]
        states = [bind(r * self.width) for r in rows]
        scores = [registers(source.blocks * KEY_LANES, "float32") for _ in rows]
        peaks = [registers(LANES, "float32") for _ in rows]
        blocks = bind(T.min(self.end - first, T.int64(source.blocks)))
        for peak in peaks:
            store(peak, 0, LANES, const(NEVER, "float32", LANES))
        with T.serial(0, (blocks + (self.together - 1)) // self.together) as i:
            self._scores(source, rows, bind(i * self.together), first, scores, peaks)
        fades = [self._weights(source, blocks, *of_row) for of_row in zip(states, scores, peaks, strict=True)]
        with T.serial(0, self.parts // self.together) as part:
            places = [bind((part * self.together + v) * LANES) for v in range(self.together)]
            self._values(source, blocks, places, states, scores, fades)
        if self.together > 1:
            with T.If(self.parts % self.together != T.int64(0)), T.Then():
                self._values(source, blocks, [bind((self.parts - 1) * LANES)], states, scores, fades)

    def _scores(
        self, source: _Source, rows: list[Expr], block: Expr, first: Expr, scores: list[Any], peaks: list[Any]
    ) -> None:
        """Scores of ``together`` blocks from ``block`` on, and their largest, lane by lane."""
        turns = self._chains(source.count * self.together)
        sums = [[registers(turns * LANES, "float32") for _ in range(self.together)] for _ in rows]
        for of_row in sums:
            for chains in of_row:
                for turn in range(turns):
                    store(chains, turn * LANES, LANES, const(0, "float32", LANES))
        step = max(turns, 4)
        with T.serial(0, self.head_dim // step) as part:
            for inner in range(step):
                d, at = bind(part * step + inner), inner % turns * LANES
                keys = [source.keys(block + b, d) for b in range(self.together)]
                for r, of_row in zip(rows, sums, strict=True):
                    query = splat(load(self.queries, r * self.head_dim + d, 1), LANES)
                    for key, chains in zip(keys, of_row, strict=True):
                        store(chains, at, LANES, fma(query, key, load(chains, at, LANES)))
        for b in range(self.together):
            begins = bind(cast((first + block + b) * KEY_LANES, "int32", 1))
            positions = bind(T.ramp(begins, 1, KEY_LANES))
            for r, of_row, of_scores, peak in zip(rows, sums, scores, peaks, strict=True):
                at = bind((block + b) * KEY_LANES)
                total = load(of_row[b], 0, LANES)
                for turn in range(1, turns):
                    total = bind(total + load(of_row[b], turn * LANES, LANES))
                store(of_scores, at, LANES, total * source.key_scales(block + b) if source.key_scales else total)
                with T.If(load(self.caps, 0, 1) > const(0, "float32")), T.Then():
                    cap, inverse = (splat(load(self.caps, side, 1), LANES) for side in (0, 1))
                    store(of_scores, at, LANES, tanh(bind(load(of_scores, at, LANES) * inverse), LANES) * cap)
                low = splat(load(self.spans, r * 2, 1), LANES)
                ends = cast(self.end * KEY_LANES - 1, "int32", 1)
                high = splat(bind(T.min(load(self.spans, r * 2 + 1, 1), ends)), LANES)
                never = const(NEVER, "float32", LANES)
                score = bind(T.Select(positions >= low, load(of_scores, at, LANES), never))
                score = bind(T.Select(positions <= high, score, never))
                store(of_scores, at, LANES, score)
                store(peak, 0, LANES, T.max(load(peak, 0, LANES), score))

    def _weights(self, source: _Source, blocks: Expr, state: Expr, scores: Any, peak: Any) -> Any:
        """Replace scores by weights times the scales of values. Returns what the sums so far are multiplied by."""
        fade = registers(LANES, "float32")
        before = load(self.state, state, 1)
        highest = intrin("float32", "llvm.vector.reduce.fmax", load(peak, 0, LANES))
        store(peak, 0, LANES, splat(bind(T.max(before, highest)), LANES))
        store(fade, 0, LANES, exp(bind(splat(before, LANES) - load(peak, 0, LANES)), LANES))
        store(self.state, state, LANES, load(peak, 0, LANES))
        of_sums = bind(state + LANES)
        store(self.state, of_sums, LANES, load(self.state, of_sums, LANES) * load(fade, 0, LANES))
        with T.serial(0, blocks) as block:
            at = bind(block * KEY_LANES)
            weights = registers(LANES, "float32")
            store(weights, 0, LANES, exp(bind(load(scores, at, LANES) - load(peak, 0, LANES)), LANES))
            seen = load(scores, at, LANES) > const(NEVER / 2, "float32", LANES)
            # What was never written may have any scale.
            zero = const(0, "float32", LANES)
            scaled = bind(load(weights, 0, LANES) * source.value_scales(block))
            store(scores, at, LANES, T.Select(seen, scaled, zero))
            store(weights, 0, LANES, T.Select(seen, load(weights, 0, LANES), zero))
            store(self.state, of_sums, LANES, load(self.state, of_sums, LANES) + load(weights, 0, LANES))
        return fade

    def _values(
        self, source: _Source, blocks: Expr, places: list[Expr], states: list[Expr], scores: list[Any], fades: list[Any]
    ) -> None:
        """Add the weighted values of 16 channels from each of ``places`` on."""
        turns = self._chains(source.count * len(places))
        sums = [[registers(turns * LANES, "float32") for _ in places] for _ in states]
        for of_row, state, fade in zip(sums, states, fades, strict=True):
            for chains, d in zip(of_row, places, strict=True):
                before = load(self.state, state + STATE_NUMBERS + d, LANES)
                store(chains, 0, LANES, before * load(fade, 0, LANES))
                for turn in range(1, turns):
                    store(chains, turn * LANES, LANES, const(0, "float32", LANES))
        with T.serial(0, blocks) as block:
            for j in range(KEY_LANES):
                values, at = [source.values(block, j, d) for d in places], j % turns * LANES
                for of_row, weights in zip(sums, scores, strict=True):
                    weight = splat(load(weights, block * KEY_LANES + j, 1), LANES)
                    for chains, value in zip(of_row, values, strict=True):
                        store(chains, at, LANES, fma(weight, value, load(chains, at, LANES)))
        for of_row, state in zip(sums, states, strict=True):
            for chains, d in zip(of_row, places, strict=True):
                total = load(chains, 0, LANES)
                for turn in range(1, turns):
                    total = bind(total + load(chains, turn * LANES, LANES))
                store(self.state, state + STATE_NUMBERS + d, LANES, total)
