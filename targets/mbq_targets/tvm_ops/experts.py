"""Experts: which ones a token takes, the product with their rows alone, and the sum of what they put out.

See ``mbq_export.format.experts``. A pair is a token and one of its experts.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from mbq_runtime.bundle.layout import ROW_BLOCK
from mbq_runtime.bundle.slice_profile import SliceProfile

from ..kernels.activations import TILE_K, chunks
from ..kernels.emit import LANES, Expr, bind, cast, const, fma, load, registers, splat, store
from ..kernels.exp import exp, sigmoid
from ..kernels.matmul import SCRATCH_BYTES
from ..spec import Experts, KernelSpec
from .drivers import PIECES, Tensor, call, driver, each, matrix_at, matrix_fields, pointer, reduce, scratch, view
from .linear import count_bits, route, routing_fields

_NEVER = -1e30
"""A score that is below all others."""


def choose(experts: Experts, name: str) -> None:
    """Operation: x float32 [M, hidden] -> out_chosen int64 [M, used], out_weights float32 [M, used].

    Other arguments: weights uint8; chooser, place in it in bytes of float32 [count, hidden]; with ``biased`` also bias,
    the place of float32 [count], padded to a multiple of 16.

    Args:
        experts: their number, and how a token chooses.
        name: the function's symbol.
    """
    tensors = {
        "x": ("float32", 2), "weights": ("uint8", 1), "out_chosen": ("int64", 2), "out_weights": ("float32", 2),
    }  # fmt: skip
    with driver(name, tensors, ("chooser", *(("bias",) if experts.biased else ()))) as args:
        x, weights, chosen, out, place, *bias_place = args
        rows, hidden = x.shape
        table = view(weights.at(place), "float32")
        biases = [view(weights.at(p), "float32") for p in bias_place]
        count, used = experts.count, experts.used
        padded = -(-count // LANES) * LANES

        def one(m: Expr) -> None:
            shares, ranks = registers(padded, "float32"), registers(padded, "float32")
            for e in range(padded - LANES, padded):
                store(shares, e, 1, T.float32(_NEVER))
            with T.serial(0, T.int64(count)) as e:
                products = registers(LANES, "float32")
                store(products, 0, LANES, const(0, "float32", LANES))
                with T.serial(0, hidden // LANES) as i:
                    value, factor = (
                        load(x.flat, m * hidden + i * LANES, LANES),
                        load(table, e * hidden + i * LANES, LANES),
                    )
                    store(products, 0, LANES, fma(value, factor, load(products, 0, LANES)))
                store(shares, e, 1, reduce("fadd", load(products, 0, LANES)))
            _share(experts, shares, padded)
            for e in range(0, padded, LANES):
                rank = load(shares, e, LANES)
                store(ranks, e, LANES, rank + load(biases[0], e, LANES) if biases else rank)
            total, best = registers(1, "float32"), T.alloc_buffer((1,), "int64", scope="global")
            store(total, 0, 1, T.float32(0))
            with T.serial(0, T.int64(used)) as j:
                store(best, 0, 1, T.int64(0))
                with T.serial(1, T.int64(count)) as e:
                    larger = load(ranks, e, 1) > load(ranks, load(best, 0, 1), 1)
                    with T.If(larger), T.Then():
                        store(best, 0, 1, e)
                expert, at = load(best, 0, 1), bind(m * used + j)
                share = load(shares, expert, 1)
                store(chosen.flat, at, 1, expert)
                store(out.flat, at, 1, share)
                store(total, 0, 1, load(total, 0, 1) + share)
                store(ranks, expert, 1, T.float32(_NEVER))
            factor = T.float32(experts.scale)
            if experts.normed:
                factor = factor / (load(total, 0, 1) + T.float32(experts.sum_eps))
            factor = bind(factor)
            with T.serial(0, T.int64(used)) as j:
                at = bind(m * used + j)
                store(out.flat, at, 1, load(out.flat, at, 1) * factor)

        each(rows, one)


def _share(experts: Experts, scores: Any, padded: int) -> None:
    """Scores to shares, in place."""
    parts = range(0, padded, LANES)
    if experts.sigmoid:
        for e in parts:
            store(scores, e, LANES, sigmoid(load(scores, e, LANES), LANES))
        return
    peak, total = registers(LANES, "float32"), registers(LANES, "float32")
    store(peak, 0, LANES, const(_NEVER, "float32", LANES))
    store(total, 0, LANES, const(0, "float32", LANES))
    for e in parts:
        store(peak, 0, LANES, bind(T.max(load(peak, 0, LANES), load(scores, e, LANES))))
    highest = registers(1, "float32")
    store(highest, 0, 1, reduce("fmax", load(peak, 0, LANES)))
    for e in parts:
        store(scores, e, LANES, exp(bind(load(scores, e, LANES) - splat(load(highest, 0, 1), LANES)), LANES))
        store(total, 0, LANES, load(total, 0, LANES) + load(scores, e, LANES))
    store(highest, 0, 1, T.float32(1) / reduce("fadd", load(total, 0, LANES)))
    for e in parts:
        store(scores, e, LANES, load(scores, e, LANES) * splat(load(highest, 0, 1), LANES))


def fields(profile: SliceProfile) -> tuple[str, ...]:
    """Names of the integers of ``experts_linear``: those of a matrix and of its router, and count.

    count: matrices that lie one below the other. The others are those of ``linear.fields``.

    Args:
        profile: bits of each slice.
    """
    return (*matrix_fields(profile), *routing_fields, "count")


def experts_linear(spec: KernelSpec, name: str) -> None:
    """Operation: x float32 [M, K] or [M J, K], chosen int64 [M, J], routed_by float32 [M, R] -> out float32 [M J, N].

    A token is routed once, and multiplied at that depth by the matrices [N, K] of its J experts. N is a multiple of 16.
    Other arguments: avg_bits, weights and used as in ``linear``; the integers of ``fields``.

    Args:
        spec: slices, group size and activation bits of the model.
        name: the function's symbol.
    """
    tensors = {
        "x": ("float32", 2), "chosen": ("int64", 2), "routed_by": ("float32", 2), "avg_bits": ("float32", 1),
        "weights": ("uint8", 1), "used": ("float32", 1), "out": ("float32", 2),
    }  # fmt: skip
    names = fields(spec.profile)
    with driver(name, tensors, names) as args:
        x, chosen, routed_by, avg_bits, weights, used, out, *rest = args
        at = dict(zip(names, rest, strict=True))
        depth = route(spec.profile, routed_by, avg_bits, weights, at)
        count_bits(spec.profile, routed_by.shape[0], depth, used, at)
        _product(spec, x, chosen, depth, weights, at, out)


def _product(
    spec: KernelSpec, x: Tensor, chosen: Tensor, depth: Any, weights: Tensor, at: dict[str, Expr], out: Tensor
) -> None:
    """The product of each pair. One token needs no sorting, and each of its pairs is the product of one token."""
    profile, group = spec.profile, spec.group_size
    (rows, k), (tokens, used), (pairs, n) = x.shape, chosen.shape, out.shape
    share = bind(T.truncdiv(pairs, rows))  # pairs that share a row of x
    groups, blocks = bind(k // group), bind(n // ROW_BLOCK)
    stored = bind(blocks * at["count"])
    row_bytes = bind(chunks(groups, group) * (spec.activation_bytes * TILE_K))
    q = scratch(row_bytes * pairs, "int8")
    step, total = scratch(pairs * groups, "float32"), scratch(pairs * groups, "float32")
    sums = scratch(pairs * groups, "int32")
    matrix = matrix_at(weights, [at[name] for name in matrix_fields(profile)])

    def activations(q_at: Expr, place: Expr) -> list[Expr]:
        return [pointer(q, q_at), pointer(step, place * groups), pointer(total, place * groups)]

    def part(i: Expr) -> tuple[Expr, Expr]:
        """The row blocks of an expert that a piece computes. The kernel of many tokens takes them in pairs."""
        of_two = bind((blocks + 1) // 2)
        return bind(2 * (of_two * i // PIECES)), bind(T.min(2 * (of_two * (i + 1) // PIECES), blocks))

    def one_token() -> None:
        def quantize(row: Expr) -> None:
            to = activations(row * row_bytes, row)
            call("quantize", x.at(row * k), *to, pointer(sums, row * groups), groups, T.int64(1))

        each(rows, quantize)
        with T.parallel(0, T.int64(PIECES)) as i:
            begin, end = part(i)
            with T.serial(0, used) as j:
                row, first = bind(T.truncdiv(j, share)), bind(load(chosen.flat, j, 1) * blocks)
                for d in range(1, profile.depths + 1):
                    with T.If(load(depth, 0, 1) == T.int32(d)), T.Then():
                        y = out.at(j * n + begin * ROW_BLOCK)
                        call(
                            f"gemv_d{d}", *activations(row * row_bytes, row), *matrix(), y, stored, groups,
                            first + begin, first + end,
                        )  # fmt: skip

    def many_tokens() -> None:
        sorted_pairs, starts = _by_expert(profile, at["count"], chosen, depth)

        def quantize(place: Expr) -> None:
            row = bind(T.truncdiv(cast(load(sorted_pairs, place, 1), "int64", 1), share))
            to = activations(place * TILE_K, place)
            call("quantize", x.at(row * k), *to, pointer(sums, place * groups), groups, pairs)

        each(pairs, quantize)
        scratches = scratch(T.int64(PIECES * SCRATCH_BYTES), "uint8")
        with T.parallel(0, T.int64(PIECES)) as i:
            begin, end = part(i)
            with T.serial(0, at["count"]) as expert:
                for d in range(1, profile.depths + 1):
                    kind = bind(expert * profile.depths + (d - 1))
                    first, count = load(starts, kind, 1), bind(load(starts, kind + 1, 1) - load(starts, kind, 1))
                    with T.If(count > 0), T.Then():
                        call(
                            f"many_d{d}", *activations(first * TILE_K, first), *matrix(), out.at(begin * ROW_BLOCK),
                            pointer(scratches, i * SCRATCH_BYTES), pointer(sorted_pairs, first),
                            pointer(sums, first * groups), stored, groups, pairs, expert * blocks + begin,
                            expert * blocks + end, count, n,
                        )  # fmt: skip

    with T.If(tokens == T.int64(1)):
        with T.Then():
            one_token()
        with T.Else():
            many_tokens()


def _by_expert(profile: SliceProfile, count: Expr, chosen: Tensor, depth: Any) -> tuple[Any, Any]:
    """(pairs int32 [M J], sorted by expert and then by depth; starts int64 [count * depths + 1], where each begins)."""
    tokens, used = chosen.shape
    kinds = bind(count * profile.depths)
    pairs = scratch(tokens * used, "int32")
    starts, places = scratch(kinds + 1, "int64"), scratch(kinds, "int64")

    def kind_of(pair: Expr) -> Expr:
        of_token = cast(load(depth, T.truncdiv(pair, used), 1), "int64", 1)
        return bind(load(chosen.flat, pair, 1) * profile.depths + of_token - 1)

    with T.serial(0, kinds + 1) as kind:
        store(starts, kind, 1, T.int64(0))
    with T.serial(0, tokens * used) as pair:
        kind = kind_of(pair)
        store(starts, kind + 1, 1, load(starts, kind + 1, 1) + 1)
    with T.serial(0, kinds) as kind:
        store(places, kind, 1, load(starts, kind, 1))
        store(starts, kind + 1, 1, load(starts, kind + 1, 1) + load(starts, kind, 1))
    with T.serial(0, tokens * used) as pair:
        kind = kind_of(pair)
        place = load(places, kind, 1)
        store(pairs, place, 1, cast(pair, "int32", 1))
        store(places, kind, 1, place + 1)
    return pairs, starts


def add_experts(name: str) -> None:
    """Operation: x float32 [M J, K], shares float32 [M, J] -> out float32 [M, K], each token's J rows by their shares.

    K is a multiple of 16.

    Args:
        name: the function's symbol.
    """
    with driver(name, {"x": ("float32", 2), "shares": ("float32", 2), "out": ("float32", 2)}) as (x, shares, out):
        (tokens, used), k = shares.shape, out.shape[1]

        def one(m: Expr) -> None:
            with T.serial(0, k // LANES) as i:
                total = registers(LANES, "float32")
                store(total, 0, LANES, const(0, "float32", LANES))
                with T.serial(0, used) as j:
                    pair = bind(m * used + j)
                    value = load(x.flat, pair * k + i * LANES, LANES)
                    share = splat(load(shares.flat, pair, 1), LANES)
                    store(total, 0, LANES, fma(value, share, load(total, 0, LANES)))
                store(out.flat, m * k + i * LANES, LANES, load(total, 0, LANES))

        each(tokens, one)
