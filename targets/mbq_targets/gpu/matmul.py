"""The sliced matmul and the embedding's rows, from the planes as bundles store them (layout ``mbq16``).

A 64-byte block of a plane is 16 consecutive 32-bit words, one for each row. Neighbouring work-items take neighbouring
rows and so read whole cache lines: nothing needs repacking. One buffer holds the planes of all slices, because a kernel
has few buffers. The scales are read as words, each the scales, or the zeros, of four rows, or the factors of two. A
work-item handles ``rows`` rows. It loads the words of its step once, joins the planes of the depth (four weights per
operation), and uses each weight for all tokens of a tile. It never reads planes beyond the depth.

Activations are float32. The definition rounds them to integers, which only the integer instructions of processors need.
The results differ by less than that rounding: 2**-15 of the largest value of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from mbq_runtime.bundle.layout import ROW_BLOCK, SCALE_STEPS, ZERO_STEPS
from mbq_runtime.bundle.slice_profile import SliceProfile

from ..kernels.emit import Expr, bind, cast, const, dtype
from ..kernels.layout import STEP, DepthPlan, plan_depth
from .kernel import (
    COUNT,
    DEEPEST,
    TOKENS,
    Item,
    Kernel,
    barrier,
    element,
    frame,
    half_to_float,
    put,
    registers,
    shared,
    spread,
    strided,
    when,
)
from .work_groups import WorkGroups

Buffers = dict[str, Any]

GROUP_WORDS = 2 * ROW_BLOCK // 4
"""Words of a group's scales and zeros in a row block, and of the factors of its rows at a depth."""


@dataclass(frozen=True)
class MatrixShape:
    """A sliced matrix.

    n: rows.
    k: columns.
    group: weights that share a scale.
    profile: bits of each slice.
    """

    n: int
    k: int
    group: int
    profile: SliceProfile

    @property
    def scale_groups(self) -> int:
        """Groups of ``GROUP_WORDS`` in a row block: the factors of its rows at each depth, then scales and zeros."""
        return self.profile.depths + self.k // self.group

    @property
    def buffers(self) -> tuple[int, int]:
        """Words of the buffers ``planes`` and ``scales``."""
        return plane_words(self.n, self.k), scale_words(self.n, self.k, self.group, self.profile.depths)


def plane_words(n: int, k: int) -> int:
    """32-bit words of all planes of an [n, k] matrix.

    Args:
        n: rows.
        k: columns.
    """
    return -(-n // ROW_BLOCK) * ROW_BLOCK * k // 4


def scale_words(n: int, k: int, group: int, depths: int) -> int:
    """32-bit words of the row factors, scales and zeros of an [n, k] matrix.

    Args:
        n: rows.
        k: columns.
        group: weights that share a scale.
        depths: E.
    """
    return -(-n // ROW_BLOCK) * (depths + k // group) * GROUP_WORDS


def weight_bytes(matrix: MatrixShape, depth: int) -> int:
    """Bytes of planes and scales that one pass over a matrix reads.

    Args:
        matrix: its sizes.
        depth: 1-based.
    """
    planes, _ = matrix.buffers
    scales = scale_words(matrix.n, matrix.k, matrix.group, 1)  # with the factors of one depth
    return planes * 4 * matrix.profile.depth_bits[depth - 1] // 8 + scales * 4


def _step_words(planes: Any, bits: Sequence[int], n: int, k: int, at: Expr, row: Expr, rows: int) -> list[list[Expr]]:
    """[plane][half]: the words of ``rows`` rows, one load each.

    planes: buffer of vectors of ``rows`` words; at: row block * (k / STEP) + step; row: in units of ``rows``.
    """
    words, start = [], 0
    n16 = -(-n // ROW_BLOCK) * ROW_BLOCK
    for width in bits:
        words.append([bind(planes[start + (at * width + i) * (ROW_BLOCK // rows) + row]) for i in range(width)])
        start += n16 * k * width // 32 // rows
    return words


def _levels(words: list[list[Expr]], plan: DepthPlan, half: int, j: Expr, rows: int) -> Expr:
    """uint32 x rows: four levels per word, those of k = 16 * half + 4 * j + 0..3. A level fits a byte."""
    border = plan.coarse_planes
    coarse = _codes(words[:border], plan.plane_bits[:border], half, j, rows)
    if border == len(words):
        return coarse
    fine = _codes(words[border:], plan.plane_bits[border:], half, j, rows)
    return bind(coarse * const(plan.stride, "uint32", rows) + fine)


def _codes(words: list[list[Expr]], bits: Sequence[int], half: int, j: Expr, rows: int) -> Expr:
    """uint32 x rows: four joined fields of neighbouring planes per word."""
    low, total = sum(bits), None
    for width, parts in zip(bits, words, strict=True):
        low -= width
        # A 1-bit plane keeps both halves of a step in one word.
        shift = cast(j * 2 if width == 2 else j + 4 * half, "uint32", 1)
        mask = const(0x01010101 * (2**width - 1), "uint32", rows)
        field = (parts[half if width == 2 else 0] >> spread(shift, rows)) & mask
        if low:
            field = field << const(low, "uint32", rows)
        total = field if total is None else total | field
    return bind(total)


def _affine(scales: Any, group: Expr, row: Expr, rows: int, plan: DepthPlan) -> tuple[Expr, Expr]:
    """(step, offset), float32 x rows: a weight is level * step + offset, in units of the row's factor.

    group: counted over all row blocks, with E more in each for its factors; row: the first of ``rows`` in the block.
    """
    at = bind(group * GROUP_WORDS + row // 4)
    scale, zero = (_bytes(bind(scales[at + i]), row, rows) for i in (0, ROW_BLOCK // 4))
    above_zero = const(plan.middle * plan.step, "float32", rows) - zero * const(1 / ZERO_STEPS, "float32", rows)
    return bind(scale * const(plan.step, "float32", rows)), bind(scale * above_zero)


def _bytes(word: Expr, row: Expr, rows: int) -> Expr:
    """float32 x rows: the bytes of a word that belong to ``rows`` rows from ``row`` on."""
    shift = bind(cast(row % 4 * 8, "uint32", 1))
    shifts = shift if rows == 1 else T.ramp(shift, T.uint32(8), rows)
    return bind(cast((spread(word, rows) >> shifts) & const(255, "uint32", rows), "float32", rows))


def _row_factor(scales: Any, matrix: MatrixShape, block: Expr, row: Expr, depth: Expr) -> Expr:
    """What the scales of one row are multiplied by, float32. row: in the block; depth: 1-based."""
    word = bind(scales[(block * matrix.scale_groups + depth - 1) * GROUP_WORDS + row // 2])
    half = (word >> cast(row % 2 * 16, "uint32", 1)) & T.uint32(0xFFFF)
    return bind(half_to_float(bind(half)) * T.float32(1 / SCALE_STEPS))


def _values(levels: Expr, t: int, scale: Expr, offset: Expr, rows: int) -> Expr:
    level = (levels >> const(8 * t, "uint32", rows)) & const(255, "uint32", rows)
    return bind(cast(level, "float32", rows) * scale + offset)


def matmul(name: str, matrix: MatrixShape, work_groups: WorkGroups, tokens: int, *, bias: bool = False) -> Kernel:
    """x float32 [tokens, k], routing int32 [tokens, 2] -> y float32 [tokens, n], plus bias float32 [n] if there is one.

    For several tokens, ``order`` int32 [tokens] lists the tokens by depth (see ``routing.order``), so that nearly every
    tile has one depth. A tile with several depths is computed once for each.

    Args:
        name: the kernel's name.
        matrix: sizes of the weight.
        work_groups: sizes of the work-groups.
        tokens: rows of x. Several must be a multiple of the tile.
        bias: add a bias.
    """
    n, k, group, profile = matrix.n, matrix.k, matrix.group, matrix.profile
    depths = profile.depths
    tile = min(work_groups.tile, tokens)
    blocks, steps = -(-n // ROW_BLOCK), k // STEP
    rows, splits, threads = work_groups.rows, work_groups.splits, work_groups.matmul_threads
    lanes = ROW_BLOCK // rows
    words, numbers = dtype("uint32", rows), dtype("float32", rows)
    buffers = {"x": ("float32x4", tokens * k // 4), "routing": ("int32", 2 * tokens)}
    if tokens > 1:
        buffers |= {"order": ("int32", tokens), "state": ("int32", TOKENS + tokens)}
    buffers |= {"planes": (words, matrix.buffers[0] // rows), "scales": ("uint32", matrix.buffers[1])}
    if bias:
        buffers["bias"] = ("float32", n)
    buffers["y"] = ("float32", tokens * n)
    grid = (blocks, tokens // tile)
    zero = const(0, "float32", rows)

    def one_depth(of: Buffers, item: Item, split: Expr, lane: Expr, token: list[Expr], sums: Any, d: int) -> None:
        plan = plan_depth(profile, d)
        for m in range(tile):
            put(sums, m, zero)
        with T.serial(0, -(-steps // splits)) as i:
            step = bind(i * splits + split)
            with when(step < steps):
                parts = _step_words(of["planes"], plan.plane_bits, n, k, bind(item.x * steps + step), lane, rows)
                at = bind(item.x * matrix.scale_groups + depths + step * STEP // group)
                scale, offset = _affine(of["scales"], at, bind(lane * rows), rows, plan)
                for half in (0, 1):
                    with T.serial(0, 4) as j:
                        levels = _levels(parts, plan, half, j, rows)
                        column = bind(step * (STEP // 4) + 4 * half + j)
                        xs = [bind(of["x"][at * (k // 4) + column]) for at in token]
                        for t in range(4):
                            value = _values(levels, t, scale, offset, rows)
                            for m, x in enumerate(xs):
                                put(sums, m, sums[m] + value * spread(element(x, t, 4), rows))

    def body() -> None:
        with frame(name, buffers, grid, threads) as (*arguments, item):
            of = dict(zip(buffers, arguments, strict=True))
            split, lane = bind(item.thread // lanes), bind(item.thread % lanes)
            token, depth = _tile_tokens(of, item, tokens, tile)
            sums = registers(tile, numbers)
            parts = shared(splits * tile * lanes, numbers)
            for d in range(1, profile.depths + 1):
                present = depth[0] == d
                for other in depth[1:]:
                    present = T.Or(present, other == d)
                with when(present):
                    one_depth(of, item, split, lane, token, sums, d)
                    for m in range(tile):
                        with when(depth[m] == d):
                            put(parts, (split * tile + m) * lanes + lane, sums[m])
            barrier()
            with strided(item, tile * lanes, threads) as i:
                place = bind(item.y * tile + i // lanes)
                total = registers(1, numbers)
                put(total, 0, zero)
                with T.serial(0, splits) as s:
                    put(total, 0, total[0] + parts[s * (tile * lanes) + i])
                result = bind(total[0])
                first = bind(item.x * ROW_BLOCK + i % lanes * rows)
                here: Expr = T.int32(0) if tokens == 1 else bind(of["order"][place])
                for r in range(rows):
                    with when(first + r < n if tokens == 1 else T.And(first + r < n, place < of["state"][COUNT])):
                        at_depth = of["routing"][2 * here]
                        factor = _row_factor(of["scales"], matrix, item.x, i % lanes * rows + r, at_depth)
                        value = bind(element(result, r, rows) * factor)
                        put(of["y"], here * n + first + r, value + of["bias"][first + r] if bias else value)

    return Kernel(name, grid, threads, body)


def _tile_tokens(of: Buffers, item: Item, tokens: int, tile: int) -> tuple[list[Expr], list[Expr]]:
    """The tokens of this work-group's tile and their depths. The depth is 0 behind the last token of the pass."""
    if tokens == 1:
        return [T.int32(0)], [bind(of["routing"][0])]
    count = bind(of["state"][COUNT])
    token, depth = [], []
    for m in range(tile):
        place = bind(item.y * tile + m)
        token.append(bind(of["order"][place]))
        depth.append(bind(T.Select(place < count, of["routing"][2 * token[-1]], T.int32(0))))
    return token, depth


def gather(name: str, table: MatrixShape, threads: int, tokens: int, *, scaled: bool = False) -> Kernel:
    """Rows of a table for the tokens in ``state``: x float32 [tokens, k]. Clears the used bits.

    They are read at full depth, or at the deepest one that ``state`` allows.

    Args:
        name: the kernel's name.
        table: sizes of the table.
        threads: work-items for each token.
        tokens: rows of x.
        scaled: multiply by factors float32 [k].
    """
    n, k, group, profile = table.n, table.k, table.group, table.profile
    steps, depths = k // STEP, profile.depths
    buffers = {
        "state": ("int32", TOKENS + tokens),
        "planes": ("uint32", table.buffers[0]),
        "scales": ("uint32", table.buffers[1]),
        **({"factors": ("float32", k)} if scaled else {}),
        "routing": ("int32", 2 * tokens),
        "x": ("float32", tokens * k),
    }
    grid = (tokens, 1)

    def body() -> None:
        with frame(name, buffers, grid, threads) as (*arguments, item):
            of = dict(zip(buffers, arguments, strict=True))
            with when(item.thread == 0):
                put(of["routing"], 2 * item.x + 1, T.int32(0))
            token = bind(of["state"][TOKENS + item.x])
            block, row = bind(token // ROW_BLOCK), bind(token % ROW_BLOCK)
            deepest = bind(of["state"][DEEPEST])

            def values(plan: DepthPlan, step: Expr) -> None:
                words = _step_words(of["planes"], plan.plane_bits, n, k, bind(block * steps + step), row, 1)
                at = bind(block * table.scale_groups + depths + step * STEP // group)
                scale, offset = _affine(of["scales"], at, row, 1, plan)
                factor = _row_factor(of["scales"], table, block, row, T.int32(plan.depth))
                for half in (0, 1):
                    with T.serial(0, 4) as j:
                        levels = _levels(words, plan, half, j, 1)
                        for t in range(4):
                            column = bind(step * STEP + 16 * half + 4 * j + t)
                            value = bind(_values(levels, t, scale, offset, 1) * factor)
                            put(of["x"], item.x * k + column, value * of["factors"][column] if scaled else value)

            with strided(item, steps, threads) as step:
                for depth in range(1, profile.depths + 1):
                    with when(deepest == depth if depth < profile.depths else deepest >= depth):
                        values(plan_depth(profile, depth), step)

    return Kernel(name, grid, threads, body)
