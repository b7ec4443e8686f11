"""Reads a row of a table at one depth, as float32."""

from __future__ import annotations

from tvm.tirx.script import builder as T

from mbq_runtime.bundle.layout import ROW_BLOCK

from .emit import Expr, bind, cast, const, fma, function, load, reinterpret, splat, store
from .layout import STEP, DepthPlan
from .matmul import plane_starts


def gather(plan: DepthPlan, group: int, name: str) -> None:
    """Kernel: y float32 [K] = the row ``row`` at the plan's depth.

    A row has 4 bytes of every 64-byte block, so the kernel handles four codes at a time in a 32-bit word.
    Kernel arguments: planes uint8, scales float16: the table; blocks: its row blocks; groups: its groups along K.

    Args:
        plan: how the depth is read.
        group: weights of a group.
        name: the function's symbol.
    """
    pointers = {"planes": "uint8", "scales": "float16", "y": "float32"}
    steps = group // STEP
    with function(name, pointers, ("blocks", "groups", "row")) as args:
        planes, scales, y, blocks, groups, row = args
        starts = plane_starts(plan, blocks, groups, group)
        first = bind(row // ROW_BLOCK * groups)
        lane = bind(row % ROW_BLOCK)
        with T.serial(0, groups) as g:
            base = bind((first + g) * (2 * ROW_BLOCK) + lane)
            scale = bind(cast(load(scales, base, 1), "float32", 1) * const(2.0 ** (2 - plan.bits), "float32"))
            offset = fma(scale, const(0.5, "float32"), cast(load(scales, base + ROW_BLOCK, 1), "float32", 1))
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
                    codes = reinterpret(_codes(plan, words, j), "uint8", 4)
                    value = fma(cast(codes, "float32", 4), splat(scale, 4), splat(offset, 4))
                    store(y, g * group + s * STEP + 4 * j, 4, value)


def _codes(plan: DepthPlan, words: list[list[Expr]], j: int) -> Expr:
    """uint32: the four codes k = 4j .. 4j + 3 of a step, from the words of every plane."""
    low, total = plan.bits, const(0, "uint32")
    for bits, parts in zip(plan.plane_bits, words, strict=True):
        low -= bits
        fields = 8 // bits
        mask = const(0x01010101 * (2**bits - 1), "uint32")
        field = (parts[j // fields] >> const(bits * (j % fields), "uint32")) & mask
        total = bind(total | (field << const(low, "uint32")))
    return total
