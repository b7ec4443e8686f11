"""Router and sliced product in one operation: the depth of each token, then its row times that many slices."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from mbq_runtime.bundle.layout import ROW_BLOCK
from mbq_runtime.bundle.slice_profile import SliceProfile

from ..constants import MAX_HIDDEN, MEAN_SQUARE_EPS
from ..kernels.activations import TILE_K, chunks
from ..kernels.emit import LANES, Expr, bind, cast, load, store
from ..kernels.matmul import SCRATCH_BYTES
from ..spec import KernelSpec
from .drivers import PIECES, Tensor, call, driver, each, i64, matrix_at, matrix_fields, pointer, scratch, view

NONE = -1
"""The place of parameters that a matrix does not have."""

routing_fields = (
    "table", "entries", "router_bias", "norm_gain", "w1", "b1", "w2", "hidden", "parameters", "all_parameters",
)  # fmt: skip
"""Names of the integers of a router, see ``fields``."""


def fields(profile: SliceProfile) -> tuple[str, ...]:
    """Names of the integers of ``linear``.

    entries: entries of the budget table. hidden: hidden width of the router, 0 for the norm rule. parameters: weights
    of this matrix. all_parameters: weights of all routed matrices. The others are places in the weights in bytes, or
    NONE.

    Args:
        profile: bits of each slice.
    """
    return (*matrix_fields(profile), "bias", *routing_fields)


def linear(spec: KernelSpec, name: str) -> None:
    """Operation: x float32 [M', K], routed_by float32 [M, K] -> out float32 [M', N16].

    M' is M, or less if only the last tokens are wanted. All M tokens are routed. N16 is N rounded up to whole row
    blocks; columns past N are 0. Other arguments: avg_bits float32 [2], average bits and the deepest depth; weights
    uint8 [bytes]; used float32 [1], which grows by this matrix's share of the average bits; the integers of ``fields``.

    Args:
        spec: slices, group size and activation bits of the model.
        name: the function's symbol.
    """
    tensors = {
        "x": ("float32", 2), "routed_by": ("float32", 2), "avg_bits": ("float32", 1), "weights": ("uint8", 1),
        "used": ("float32", 1), "out": ("float32", 2),
    }  # fmt: skip
    names = fields(spec.profile)
    with driver(name, tensors, names) as args:
        x, routed_by, avg_bits, weights, used, out, *rest = args
        at = dict(zip(names, rest, strict=True))
        profile = spec.profile
        depth = route(profile, routed_by, avg_bits, weights, at)
        count_bits(profile, routed_by.shape[0], depth, used, at)
        _product(spec, x, bind(routed_by.shape[0] - x.shape[0]), depth, weights, at, out)


def _float64(buffer: Any, index: Expr) -> Expr:
    return bind(cast(load(buffer, index, 1), "float64", 1))


def route(profile: SliceProfile, x: Tensor, avg_bits: Tensor, weights: Tensor, at: dict[str, Expr]) -> Any:
    """The depths of tokens, by the rule of ``route`` in ``mbq_export.format``: a buffer int32 [M].

    Args:
        profile: bits of each slice.
        x: what the router reads, float32 [M, K].
        avg_bits: float32 [2], average bits and the deepest depth.
        weights: uint8 [bytes].
        at: the integers of ``routing_fields``, by name.
    """
    rows, k = x.shape
    out = scratch(rows, "int32")
    table = view(weights.at(at["table"]), "float32")
    last = bind(at["entries"] - 1)
    bits, most = _float64(avg_bits.flat, 0), bind(cast(load(avg_bits.flat, 1, 1), "int32", 1))
    first_budget, last_budget = _float64(table, 0), _float64(table, last)
    with T.If(bits <= first_budget):
        with T.Then(), T.serial(0, rows) as m:
            store(out, m, 1, T.int32(1))
        with T.Else(), T.If(bits >= last_budget):
            with T.Then(), T.serial(0, rows) as m:
                store(out, m, 1, bind(T.min(most, T.int32(profile.depths))))
            with T.Else():
                threshold = _threshold(table, at["entries"], bits)
                each(rows, lambda m: _depth(profile, x.at(m * k), k, weights, at, (threshold, most), out, m))
    return out


def _threshold(table: Any, entries: Expr, bits: Expr) -> Expr:
    """The threshold for a budget inside the table, linear between entries."""
    low = T.alloc_buffer((1,), "int64", scope="global")
    store(low, 0, 1, T.int64(0))
    with T.serial(1, entries - 1) as i, T.If(_float64(table, i) <= bits), T.Then():
        store(low, 0, 1, i)
    i = load(low, 0, 1)
    left, right = _float64(table, i), _float64(table, i + 1)
    below, above = _float64(table, entries + i), _float64(table, entries + i + 1)
    return bind(below + (above - below) * ((bits - left) / (right - left)))


def _depth(
    profile: SliceProfile, x: Expr, k: Expr, weights: Tensor, at: dict[str, Expr], limits: tuple[Expr, Expr], out: Any,
    m: Expr,
) -> None:  # fmt: skip
    """The depth of one token. limits: the threshold, and the deepest depth.

    A kernel computes the long sums. The few numbers that follow are float64.
    """
    hidden, (threshold, most) = at["hidden"], limits
    sums = T.alloc_buffer(((1 + MAX_HIDDEN) * LANES,), "float32", scope="global")
    call("router_sums", x, weights.at(at["w1"]), pointer(sums, 0), k, hidden)

    def row_sum(row: Expr) -> Expr:
        parts = [_float64(sums, row * LANES + i) for i in range(LANES)]
        value = parts[0]
        for part in parts[1:]:
            value = bind(value + part)
        return value

    one = T.float64(1)
    mean_square = bind(row_sum(T.int64(0)) / cast(k, "float64", 1) + T.float64(MEAN_SQUARE_EPS))
    log_square, inverse = bind(T.log(mean_square)), bind(one / T.sqrt(mean_square))
    bias, gain, b1, w2 = (view(weights.at(at[f]), "float32") for f in ("router_bias", "norm_gain", "b1", "w2"))
    steps = profile.depths - 1
    scores = T.alloc_buffer((max(steps, 1),), "float64", scope="global")
    for e in range(steps):
        store(scores, e, 1, _float64(bias, e) + _float64(gain, e) * log_square)
    with T.serial(0, hidden) as h:
        pre = bind(row_sum(h + 1) * inverse + _float64(b1, h))
        active = bind(pre / (one + T.exp(T.float64(0) - pre)))
        for e in range(steps):
            store(scores, e, 1, load(scores, e, 1) + _float64(w2, hidden * e + h) * active)
    depth: Expr = T.int32(1)
    passed: Expr = T.int32(1)
    for e in range(steps):
        passed = bind(passed * cast(load(scores, e, 1) > threshold, "int32", 1))
        depth = bind(depth + passed)
    store(out, m, 1, bind(T.min(depth, most)))


def count_bits(profile: SliceProfile, rows: Expr, depth: Any, used: Tensor, at: dict[str, Expr]) -> None:
    """Add a matrix's share of the average bits to ``used``.

    Args:
        profile: bits of each slice.
        rows: tokens, M.
        depth: buffer int32 [M].
        used: float32 [1].
        at: the integers of ``routing_fields``, by name.
    """
    total = T.alloc_buffer((1,), "float64", scope="global")
    store(total, 0, 1, T.float64(0))
    with T.serial(0, rows) as m:
        value = load(depth, m, 1)
        bits: Expr = T.int32(profile.depth_bits[0])
        for e, (below, above) in enumerate(zip(profile.depth_bits, profile.depth_bits[1:], strict=False), 1):
            bits = bits + cast(value > e, "int32", 1) * (above - below)
        store(total, 0, 1, load(total, 0, 1) + cast(bits, "float64", 1))
    share = cast(at["parameters"], "float64", 1) / (cast(at["all_parameters"], "float64", 1) * cast(rows, "float64", 1))
    store(used.flat, 0, 1, load(used.flat, 0, 1) + cast(load(total, 0, 1) * share, "float32", 1))


def _product(
    spec: KernelSpec, x: Tensor, skipped: Expr, depth: Any, weights: Tensor, at: dict[str, Expr], out: Tensor
) -> None:
    """The product. skipped: tokens at the front of ``depth`` that ``x`` does not have."""
    profile, group = spec.profile, spec.group_size
    rows, k = x.shape
    n = out.shape[1]
    groups, blocks = bind(k // group), bind(n // ROW_BLOCK)
    q = scratch(chunks(groups, group) * (spec.activation_bytes * TILE_K) * rows, "int8")
    step, total = scratch(rows * groups, "float32"), scratch(rows * groups, "float32")
    sums = scratch(rows * groups, "int32")
    matrix = matrix_at(weights, [at[name] for name in matrix_fields(profile)])
    tokens, starts = _by_depth(profile, rows, skipped, depth)

    def activations(place: Expr) -> list[Expr]:
        """Pointers to the activations of one token. Tokens of one depth are neighbours."""
        return [pointer(q, place * TILE_K), pointer(step, place * groups), pointer(total, place * groups)]

    def quantize(place: Expr) -> None:
        row = x.at(i64(load(tokens, place, 1)) * k)
        call("quantize", row, *activations(place), pointer(sums, place * groups), groups, rows)

    def multiply(kernel: str, places: tuple[Expr, Expr], of_blocks: tuple[Expr, Expr], memory: Expr) -> None:
        """places: the first token's, and how many tokens. of_blocks: the first row block, and the end."""
        (first, count), (begin, end) = places, of_blocks
        call(
            kernel, *activations(first), *matrix(), out.at(begin * ROW_BLOCK), memory, pointer(tokens, first),
            pointer(sums, first * groups), blocks, groups, rows, begin, end, count, n,
        )  # fmt: skip

    each(rows, quantize)
    # A single token needs no tile.
    scratches = scratch(T.min(rows - 1, T.int64(1)) * (PIECES * SCRATCH_BYTES), "uint8")
    with T.parallel(0, T.int64(PIECES)) as i:
        # The kernel of many tokens takes row blocks in pairs.
        pairs = bind((blocks + 1) // 2)
        begin = bind(2 * (pairs * i // PIECES))
        end = bind(T.min(2 * (pairs * (i + 1) // PIECES), blocks))
        for d in range(1, profile.depths + 1):
            first, count = load(starts, d - 1, 1), bind(load(starts, d, 1) - load(starts, d - 1, 1))
            with T.If(count > 0), T.Then(), T.If(rows == T.int64(1)):
                with T.Then():
                    y = out.at(begin * ROW_BLOCK)
                    call(f"gemv_d{d}", *activations(T.int64(0)), *matrix(), y, blocks, groups, begin, end)
                with T.Else():
                    memory = pointer(scratches, i * SCRATCH_BYTES)
                    multiply(f"many_d{d}", (first, count), (begin, end), memory)
        _add_bias(weights, at["bias"], out, begin, end)


def _by_depth(profile: SliceProfile, rows: Expr, skipped: Expr, depth: Any) -> tuple[Any, Any]:
    """(tokens int32 [rows], sorted by depth; starts int64 [depths + 1], where each depth begins)."""
    tokens = scratch(rows, "int32")
    starts = T.alloc_buffer((profile.depths + 1,), "int64", scope="global")
    count = T.alloc_buffer((1,), "int64", scope="global")
    store(count, 0, 1, T.int64(0))
    for d in range(1, profile.depths + 1):
        store(starts, d - 1, 1, load(count, 0, 1))
        with T.serial(0, rows) as m, T.If(load(depth, skipped + m, 1) == T.int32(d)), T.Then():
            place = load(count, 0, 1)
            store(tokens, place, 1, cast(m, "int32", 1))
            store(count, 0, 1, place + 1)
    store(starts, profile.depths, 1, load(count, 0, 1))
    return tokens, starts


def _add_bias(weights: Tensor, place: Expr, out: Tensor, begin: Expr, end: Expr) -> None:
    rows, n = out.shape
    with T.If(place >= T.int64(0)), T.Then():
        bias = view(weights.at(place), "float32")
        with T.serial(0, rows) as m, T.serial(begin, end) as b:
            column = bind(b * ROW_BLOCK)
            value = load(out.flat, m * n + column, ROW_BLOCK) + load(bias, column, ROW_BLOCK)
            store(out.flat, m * n + column, ROW_BLOCK, value)
