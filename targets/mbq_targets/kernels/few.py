"""The product of few tokens of one depth: each weight is read and unpacked once, and multiplied with all of them.

A token's numbers are those of ``gemv``, bit for bit. The integer products are exact in both, and the few operations in
float32 that follow are the same.
"""

from __future__ import annotations

from tvm.tirx.script import builder as T

from mbq_runtime.bundle.layout import ROW_BLOCK

from .activations import TILE_K, bytes_at
from .emit import Expr, bind, cast, const, fma, function, load, prefetch, registers, splat, store
from .isa import Isa
from .layout import STEP, DepthPlan
from .matmul import (
    MANY_INTEGERS,
    MANY_POINTERS,
    SCALES_BYTES,
    Levels,
    group_value,
    plane_loader,
    plane_starts,
    prefetch_step,
    row_block_at,
    row_factors,
    subtracted,
)
from .products import Products
from .unpack import code_bytes, tile_max_code


def few(isa: Isa, plan: DepthPlan, group: int, width: int, name: str) -> None:
    """Kernel: the product of few tokens of one depth.

    The kernel arguments are those of ``gemm``. Scratch memory has the outputs of a row block, float32 [count][16].

    Args:
        isa: instruction set.
        plan: how the depth is read.
        group: weights of a group.
        width: bytes of an activation.
        name: the function's symbol.
    """
    together, vectors, unit = isa.few_tokens, isa.few_vectors, plan.tile_unit_log2
    max_code, rows = tile_max_code(plan), isa.rows
    offset = Products.offset(isa, max_code)
    # The codes of ``gemv`` may have another offset. The integers get the difference.
    lost = subtracted(isa, plan)
    missing = offset - int(lost * 2.0**-unit)
    levels = Levels.of(plan, unit, lost)
    ahead = isa.prefetch_bytes // (ROW_BLOCK * group * plan.bits // 8)  # groups
    with function(name, MANY_POINTERS, MANY_INTEGERS) as args:
        q, step, total, planes, places, scales, y, scratch, tokens, sums, *integers = args
        blocks, groups, all_rows, begin, end, count, y_stride = integers
        starts = plane_starts(plan, places, blocks, groups, group)
        acc = T.decl_buffer((1 << 40,), "float32", data=scratch.data)
        turns = bind((count + (together - 1)) // together)
        # TVM would compute an expression anew for each token. It leaves loads alone.
        held = [[registers(isa.vector_bytes, "uint8") for _ in range(group // 4)] for _ in range(vectors)]
        scale, above = ([registers(rows, "float32") for _ in range(vectors)] for _ in range(2))

        def hold(v: int, vector: Expr, step_at: Expr, base: Expr) -> None:
            """Unpack a group of a row vector."""
            for s in range(group // STEP):
                read = plane_loader(isa, plan, planes, starts, step_at + s)(vector)
                for half, codes in enumerate(code_bytes(isa, plan, read, offset > 0)):
                    for j, code in enumerate(Products.stored(codes)):
                        store(held[v][s * STEP // 4 + 4 * half + j], 0, isa.vector_bytes, code)
            of_group = levels.affine(scales, base + vector * rows, rows)
            for kept, value in zip((scale[v], above[v]), of_group, strict=True):
                store(kept, 0, rows, value)

        def multiply(turn: Expr, first_vector: Expr, g: Expr) -> None:
            """Add the product of a group and the tokens of a turn. The last token is repeated to fill the turn."""
            seats = [bind(turn * together + m) for m in range(together)]
            taken = [bind(T.min(seat, count - 1)) for seat in seats]
            runs = [bind(at + place * TILE_K) for place in taken for at in bytes_at(g, width, all_rows, group)]
            products = Products(isa, together, width, vectors, max_code, chains=isa.chains)
            for k in range(0, group, 16):

                def codes(j: int, v: int, first: int = k // 4) -> Expr:
                    return load(held[v][first + j], 0, isa.vector_bytes)

                products.add(codes, q, [bind(run + k) for run in runs])
            for seat, place, dots in zip(seats, taken, products.results(), strict=True):
                of_token = bind(place * groups + g)
                token = (load(step, of_token, 1), load(total, of_token, 1))
                more = bind(load(sums, of_token, 1) * const(missing, "int32")) if missing else None
                for v, product in enumerate(dots):
                    dot = product if more is None else bind(product + splat(more, rows))
                    value = group_value(dot, load(above[v], 0, rows), token, rows)
                    at = bind(seat * ROW_BLOCK + (first_vector + v) * rows)
                    store(acc, at, rows, fma(load(scale[v], 0, rows), value, load(acc, at, rows)))

        with T.serial(0, end - begin) as b:
            with T.serial(0, turns * together) as seat:
                store(acc, seat * ROW_BLOCK, ROW_BLOCK, const(0, "float32", ROW_BLOCK))
            first = bind((begin + b) * groups)
            scales_at = bind(row_block_at(plan, begin + b, groups))
            with T.serial(0, groups) as g:
                base = bind(scales_at + (g + plan.profile.depths) * SCALES_BYTES)
                step_at = bind((first + g) * (group // STEP))
                if isa.prefetch_bytes:
                    for s in range(group // STEP):
                        prefetch_step(plan, planes, starts, step_at + ahead * (group // STEP) + s)
                    prefetch(scales, base + ahead * SCALES_BYTES)
                with T.serial(0, isa.vectors // vectors) as bundle:
                    first_vector = bind(bundle * vectors)
                    for v in range(vectors):
                        hold(v, bind(first_vector + v), step_at, base)
                    with T.serial(0, turns) as turn:
                        multiply(turn, first_vector, g)
            with T.serial(0, count) as m:
                row = bind(cast(load(tokens, m, 1), "int64", 1))
                factor = row_factors(plan, scales, scales_at, ROW_BLOCK, levels.unit)
                value = load(acc, m * ROW_BLOCK, ROW_BLOCK) * factor
                store(y, row * y_stride + b * ROW_BLOCK, ROW_BLOCK, value)
