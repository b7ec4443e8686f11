"""Reads a row of a table at one depth, as float32."""

from __future__ import annotations

from tvm.tirx.script import builder as T

from mbq_runtime.bundle.layout import ROW_BLOCK, ZERO_STEPS

from .emit import Expr, bind, cast, const, fma, function, load, reinterpret, splat, store
from .layout import STEP, DepthPlan
from .matmul import SCALES_BYTES, WEIGHT_POINTERS, plane_starts, row_block_at, row_factors


def gather(plan: DepthPlan, group: int, name: str) -> None:
    """Kernel: y float32 [K] = the row ``row`` at the plan's depth.

    A row has 4 bytes of every 64-byte block, so the kernel handles four codes at a time in a 32-bit word.
    Kernel arguments: planes, scales uint8 and places int64 [slices]: the table; blocks: its row blocks; groups: its
    groups along K.

    Args:
        plan: how the depth is read.
        group: weights of a group.
        name: the function's symbol.
    """
    steps = group // STEP
    with function(name, {**WEIGHT_POINTERS, "y": "float32"}, ("blocks", "groups", "row")) as args:
        planes, places, scales, y, blocks, groups, row = args
        starts = plane_starts(plan, places, blocks, groups, group)
        first = bind(row // ROW_BLOCK * groups)
        lane = bind(row % ROW_BLOCK)
        scales_at = bind(row_block_at(plan, row // ROW_BLOCK, groups))
        factor = row_factors(plan, scales, scales_at + 2 * lane, 1)
        with T.serial(0, groups) as g:
            base = bind(scales_at + (g + plan.profile.depths) * SCALES_BYTES + lane)
            scale = bind(cast(load(scales, base, 1), "float32", 1) * factor)
            zero = cast(load(scales, base + ROW_BLOCK, 1), "float32", 1)
            above_zero = fma(zero, const(-1 / ZERO_STEPS, "float32"), const(plan.middle * plan.step, "float32"))
            offset = bind(scale * above_zero)
            scale = bind(scale * const(plan.step, "float32"))
            with T.serial(0, steps) as s:
                at = bind((first + g) * steps + s)
                words = [
                    [
                        bind(reinterpret(load(planes, start + (at * bits + i) * 64 + 4 * lane, 4), "uint32", 1))
                        for i in range(bits)
                    ]
                    for start, bits in zip(starts, plan.plane_bits, strict=True)
                ]
                for j in range(STEP // 4):
                    levels = reinterpret(_levels(plan, words, j), "uint8", 4)
                    value = fma(cast(levels, "float32", 4), splat(scale, 4), splat(offset, 4))
                    store(y, g * group + s * STEP + 4 * j, 4, value)


def _levels(plan: DepthPlan, words: list[list[Expr]], j: int) -> Expr:
    """uint32: the four levels k = 4j .. 4j + 3 of a step, from the words of every plane. A level fits a byte."""
    border = plan.coarse_planes
    coarse = _codes(plan.plane_bits[:border], words[:border], j)
    if border == len(words):
        return coarse
    return bind(coarse * const(plan.stride, "uint32") + _codes(plan.plane_bits[border:], words[border:], j))


def _codes(plane_bits: tuple[int, ...], words: list[list[Expr]], j: int) -> Expr:
    """uint32: four joined fields of neighbouring planes."""
    low, total = sum(plane_bits), const(0, "uint32")
    for bits, parts in zip(plane_bits, words, strict=True):
        low -= bits
        fields = 8 // bits
        mask = const(0x01010101 * (2**bits - 1), "uint32")
        field = (parts[j // fields] >> const(bits * (j % fields), "uint32")) & mask
        total = bind(total | (field << const(low, "uint32")))
    return total
