"""Grouped-query attention over a cache that every layer writes in place.

A cache of 8 bits is that of ``mbq_export.format.attention``, and ``ort_ops/attend.c`` attends over it. In float32, keys
are in blocks of KEY_LANES positions: ``[layer][head][position / 16][head_dim][position % 16]``. 16 scores are then sums
of whole vectors. Values are ``[layer][head][position][head_dim]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from tvm.tirx.script import builder as T

from mbq_runtime.bundle.layout import KEY_LANES

from ..kernels.emit import LANES, Expr, bind, cast, const, fma, load, registers, splat, store
from ..kernels.exp import exp, sigmoid, tanh
from .drivers import Tensor, call, driver, each, pointer, reduce, scratch, view

SERIAL_SCORES = 4096
"""With fewer scores, a launch of threads takes longer than the scores."""

_KEY_LANES_LOG2 = T.int64(KEY_LANES.bit_length() - 1)

_CHAINS = 4
"""Sums of products that take turns, which hides the latency of a multiply-add."""

_NEVER = -1e30
"""A score whose exponential is 0."""

STILL = -1
"""The place of a table of rotations, in a layer that is not rotated."""


@dataclass(frozen=True)
class Attention:
    """The attention of a decoder.

    heads: query heads.
    kv_heads: heads of keys and of values.
    head_dim: width of a head.
    rotated: how many of the first numbers of a head are rotated.
    scale: factor of q . k.
    norm_eps: added to the mean square in a norm over each head of q and k. None: no norm.
    norm_rows: that norm is over all heads of q together, and of k.
    norm_last: that norm comes behind the rotation, not before it.
    some_still: some layers are not rotated. They give ``STILL`` for the places of their tables.
    cap: soft cap of the scores. None: none.
    grows: queries are multiplied by a number of their position.
    gates: how many numbers qkv has for each head behind v: 0, 1, or one for each channel. What the head attends to is
        multiplied by their sigmoids.
    kv_bits: bits of a cached key or value: 32 for float32, or 8.
    value_norms: each head of values goes through a norm that multiplies by 1.
    some_share: some layers have queries alone, and attend to the keys and values of the layer that ``layer`` names.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotated: int
    scale: float
    norm_eps: float | None
    norm_rows: bool = False
    norm_last: bool = False
    some_still: bool = False
    cap: float | None = None
    grows: bool = False
    gates: int = 0
    kv_bits: int = 32
    value_norms: bool = False
    some_share: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the operation's integers."""
        growth, shares = ("growth",) if self.grows else (), ("shares",) if self.some_share else ()
        return ("layer", "cos", "sin", "q_norm", "k_norm", "window", *growth, *shares)


def attention(shape: Attention, name: str) -> None:
    """Operation: qkv float32 [M, (heads + 2 kv_heads) * head_dim] -> out float32 [M, heads * head_dim].

    Arguments: past int64 [1], positions before the first of the M tokens; keys and values, the cache, which must have
    room for the M tokens and gets their keys and values; weights uint8; ``Attention.fields``: layer; cos, sin, q_norm,
    k_norm, places in the weights in bytes; window, positions that a token sees, itself included; growth, the place of
    float32 [context] that queries are multiplied by; shares, 1 where qkv has queries alone, else 0.

    Args:
        shape: the heads.
        name: the function's symbol.
    """
    tensors = {
        "qkv": ("float32", 2), "past": ("int64", 1),
        **({"keys": ("uint8", 4), "values": ("uint8", 4)} if shape.kv_bits == 8 else
           {"keys": ("float32", 5), "values": ("float32", 4)}),
        "weights": ("uint8", 1), "out": ("float32", 2),
    }  # fmt: skip
    with driver(name, tensors, shape.fields) as args:
        one = _opened(shape, args)
        each(one.rows, one.enter)
        if shape.kv_bits == 8:
            one.attend_to_codes()
        else:
            one.attend_to_numbers()


@dataclass(frozen=True)
class _Pass:
    """One call of the operation. Its methods write the statements.

    qkv, keys, values, out, layer, cos, window: arguments of the operation.
    shares: the argument of that name, or nothing.
    start: position of the first of the M tokens.
    queries: float32 [M, heads, head_dim] that are rotated and scaled. turned_keys: float32 [M, kv_heads, head_dim] that
        are rotated, for a cache of 8 bits. normed_values: the same of values with a norm.
    tables: cosines and sines. norms: weights of the norms of q and of k. growths: the table of growth, or nothing.
    """

    shape: Attention
    qkv: Tensor
    keys: Tensor
    values: Tensor
    out: Tensor
    layer: Expr
    cos: Expr
    window: Expr
    shares: list[Expr]
    start: Expr
    queries: Any
    turned_keys: Any
    normed_values: Any
    tables: list[Any]
    norms: list[Any]
    growths: list[Any]

    @property
    def rows(self) -> Expr:
        """M."""
        return self.qkv.shape[0]

    @property
    def width(self) -> Expr:
        """Numbers in a row of qkv. With gates, or in a layer of queries alone, it is padded to whole blocks."""
        s = self.shape
        return self.qkv.shape[1] if s.gates or s.some_share else (s.heads + 2 * s.kv_heads) * s.head_dim

    def enter(self, m: Expr) -> None:
        """Turn the queries of token ``m``, and remember its keys and values."""
        s = self.shape
        position = bind(self.start + m)
        rows_scale = self._rows_scale(m) if s.norm_rows and s.norm_eps is not None else None
        with T.serial(0, T.int64(s.heads)) as h:
            norm = _HeadNorm(self.norms[0], rows_scale, 0, h)
            turned = _turn(s, self.qkv.flat, m * self.width + h * s.head_dim, norm, self.tables, position, self.cos)
            for d in range(0, s.head_dim, LANES):
                value = load(turned, d, LANES) * const(s.scale, "float32", LANES)
                for table in self.growths:
                    value = value * splat(load(table, position, 1), LANES)
                store(self.queries, (m * s.heads + h) * s.head_dim + d, LANES, value)
        if self.shares:
            with T.If(self.shares[0] == T.int64(0)), T.Then():
                self._remember(m, position, rows_scale)
        else:
            self._remember(m, position, rows_scale)

    def _rows_scale(self, m: Expr) -> Any:
        """What a norm over all heads multiplies q and k of token ``m`` by, float32 [2]."""
        s = self.shape
        assert s.norm_eps is not None
        rows_scale = registers(2, "float32")
        for part, heads in enumerate((s.heads, s.kv_heads)):
            at = bind(m * self.width + part * s.heads * s.head_dim)
            store(rows_scale, part, 1, _inverse_rms(self.qkv.flat, at, heads * s.head_dim, s.norm_eps))
        return rows_scale

    def _remember(self, m: Expr, position: Expr, rows_scale: Any) -> None:
        """Put the keys and values of a token into the cache. For a cache of 8 bits, keys go to ``turned_keys``."""
        s = self.shape
        block, lane = bind(position >> _KEY_LANES_LOG2), bind(position & T.int64(KEY_LANES - 1))
        with T.serial(0, T.int64(s.kv_heads)) as h:
            norm = _HeadNorm(self.norms[1], rows_scale, 1, h)
            at = m * self.width + (s.heads + h) * s.head_dim
            turned = _turn(s, self.qkv.flat, at, norm, self.tables, position, self.cos)
            value_at = m * self.width + (s.heads + s.kv_heads + h) * s.head_dim
            if s.kv_bits == 8:
                for d in range(0, s.head_dim, LANES):
                    store(self.turned_keys, (m * s.kv_heads + h) * s.head_dim + d, LANES, load(turned, d, LANES))
                if self.normed_values is not None:
                    self._put_value(value_at, self.normed_values, (m * s.kv_heads + h) * s.head_dim)
                return
            head = bind(self.layer * s.kv_heads + h)
            key_block = head * self.keys.shape[2] + block
            with T.serial(0, T.int64(s.head_dim)) as d:
                store(self.keys.flat, (key_block * s.head_dim + d) * KEY_LANES + lane, 1, load(turned, d, 1))
            place = (head * (self.keys.shape[2] * KEY_LANES) + position) * s.head_dim
            self._put_value(value_at, self.values.flat, place)

    def _put_value(self, at: Expr, where: Any, place: Expr) -> None:
        """Put the value at ``qkv[at]``, behind its norm if it has one, to ``where[place]``."""
        s = self.shape
        inverse = None
        if s.value_norms and s.norm_eps is not None:
            inverse = bind(splat(_inverse_rms(self.qkv.flat, at, s.head_dim, s.norm_eps), LANES))
        for d in range(0, s.head_dim, LANES):
            value = load(self.qkv.flat, at + d, LANES)
            value = value if inverse is None else value * inverse
            store(where, place + d, LANES, value)

    def attend_to_codes(self) -> None:
        """Attend over a cache of 8 bits, which also gets the keys and values of the tokens."""
        s = self.shape
        of_layer = bind(self.layer * (s.kv_heads * (self.keys.shape[2] * self.keys.shape[3])))
        call(
            "attention", pointer(self.queries, T.int64(0)), pointer(self.turned_keys, T.int64(0)),
            *self._given_values(),
            self.keys.at(of_layer), self.values.at(of_layer), self.out.at(T.int64(0)), T.int64(s.heads),
            T.int64(s.kv_heads), T.int64(s.head_dim), self.start, self.rows, self.window, self.keys.shape[2],
            T.float32(s.cap or 0),
        )  # fmt: skip
        if s.gates:
            each(self.rows, self._open_gates)

    def _given_values(self) -> tuple[Expr, Expr]:
        """Where the values of the tokens are, for a cache of 8 bits, and from one token to the next in numbers."""
        s = self.shape
        if self.normed_values is not None:
            return pointer(self.normed_values, T.int64(0)), T.int64(s.kv_heads * s.head_dim)
        return self.qkv.at(T.int64((s.heads + s.kv_heads) * s.head_dim)), bind(T.int64(1) * self.width)

    def attend_to_numbers(self) -> None:
        """Attend over a cache of float32, one token and head at a time."""
        count = bind(self.rows * self.shape.heads)
        with T.If(count * (self.start + self.rows) < T.int64(SERIAL_SCORES)):
            with T.Then(), T.serial(0, count) as i:
                self._attend_head(i)
            with T.Else(), T.parallel(0, count) as i:
                self._attend_head(i)

    def _attend_head(self, i: Expr) -> None:
        """i: head times M, and the token."""
        s = self.shape
        h = bind(T.truncdiv(i, self.rows))
        m = bind(i - h * self.rows)
        head = bind(self.layer * s.kv_heads + T.truncdiv(h, T.int64(s.heads // s.kv_heads)))
        place = bind((m * s.heads + h) * s.head_dim)
        last = self.start + m
        first = bind(T.max(last + 1 - self.window, T.int64(0)))
        head_blocks = bind(head * self.keys.shape[2])
        _attend(s, self.queries, place, self.keys, self.values, head_blocks, first, bind(last), self.out)
        if s.gates:
            self._open_gate(m, h)

    def _open_gates(self, m: Expr) -> None:
        with T.serial(0, T.int64(self.shape.heads)) as h:
            self._open_gate(m, h)

    def _open_gate(self, m: Expr, h: Expr) -> None:
        """Multiply what head ``h`` of token ``m`` attends to by its gates."""
        s, qkv, out = self.shape, self.qkv.flat, self.out.flat
        place = bind((m * s.heads + h) * s.head_dim)
        gate = bind(m * self.width + (s.heads + 2 * s.kv_heads) * s.head_dim + h * s.gates)
        opening = sigmoid(splat(load(qkv, gate, 1), LANES), LANES) if s.gates == 1 else None
        for d in range(0, s.head_dim, LANES):
            of_lanes = sigmoid(load(qkv, gate + d, LANES), LANES) if opening is None else opening
            store(out, place + d, LANES, load(out, place + d, LANES) * of_lanes)


def _opened(s: Attention, args: list[Any]) -> _Pass:
    """The operation with its arguments: its working memory, and where things are."""
    qkv, past, keys, values, weights, out, layer, cos, sin, q_norm, k_norm, window, *more = args
    growth, shares = more[: int(s.grows)], more[int(s.grows) :]
    rows, start = qkv.shape[0], bind(load(past.flat, 0, 1))
    queries = scratch(rows * (s.heads * s.head_dim), "float32")
    of_heads = rows * (s.kv_heads * s.head_dim)
    turned_keys = scratch(of_heads, "float32") if s.kv_bits == 8 else None
    normed_values = scratch(of_heads, "float32") if s.kv_bits == 8 and s.value_norms else None
    tables, norms, growths = (
        [view(weights.at(place), "float32") for place in places] for places in ((cos, sin), (q_norm, k_norm), growth)
    )
    return _Pass(
        s, qkv, keys, values, out, layer, cos, window, shares, start, queries, turned_keys, normed_values, tables,
        norms, growths,
    )  # fmt: skip


class _HeadNorm(NamedTuple):
    """The norm of a head. gain: its weights; rows_scale: of the whole row, by part; part: 0 for q, 1 for k; head:
    which of the part's heads."""

    gain: Any
    rows_scale: Any
    part: int
    head: Expr


def _turn(s: Attention, x: Any, at: Expr, norm: _HeadNorm, tables: list[Any], position: Expr, cos: Expr) -> Any:
    """The head at ``x[at]``, with its norm and its rotation, in registers. cos: place of the rotation's table."""
    values = registers(s.head_dim, "float32")
    if s.norm_eps is None or s.norm_last:
        for d in range(0, s.head_dim, LANES):
            store(values, d, LANES, load(x, at + d, LANES))
    else:
        _norm_head(s, norm, x, at, values)
    if s.some_still:
        with T.If(cos != T.int64(STILL)), T.Then():
            _rotate(s, values, tables, position)
    else:
        _rotate(s, values, tables, position)
    if s.norm_eps is not None and s.norm_last:
        _norm_head(s, norm, values, T.int64(0), values)
    return values


def _norm_head(s: Attention, norm: _HeadNorm, x: Any, at: Expr, values: Any) -> None:
    """Put the normed head at ``x[at]`` into ``values``."""
    assert s.norm_eps is not None
    inverse = load(norm.rows_scale, norm.part, 1) if s.norm_rows else _inverse_rms(x, at, s.head_dim, s.norm_eps)
    scale = bind(splat(inverse, LANES))
    first = norm.head * s.head_dim if s.norm_rows else 0
    for d in range(0, s.head_dim, LANES):
        store(values, d, LANES, load(x, at + d, LANES) * scale * load(norm.gain, first + d, LANES))


def _rotate(s: Attention, values: Any, tables: list[Any], position: Expr) -> None:
    half = s.rotated // 2
    lanes = math.gcd(half, LANES)
    for d in range(0, half, lanes):
        cos, sin = (load(table, position * half + d, lanes) for table in tables)
        a, b = load(values, d, lanes), load(values, half + d, lanes)
        store(values, d, lanes, a * cos - b * sin)
        store(values, half + d, lanes, b * cos + a * sin)


def _inverse_rms(x: Any, at: Expr, width: int, eps: float) -> Expr:
    squares = const(0, "float32", LANES)
    for d in range(0, width, LANES):
        value = load(x, at + d, LANES)
        squares = fma(value, value, squares)
    return bind(T.float32(1) / T.sqrt(reduce("fadd", squares) / T.float32(width) + T.float32(eps)))


def _attend(
    s: Attention, queries: Any, place: Expr, keys: Tensor, values: Tensor, head_blocks: Expr, first: Expr, last: Expr,
    out: Tensor,
) -> None:  # fmt: skip
    """One token and head over positions first .. last. The softmax goes block by block, and rescales its sums when
    a score is larger than all before."""
    parts = range(0, s.head_dim, LANES)
    peak, weight = registers(1, "float32"), registers(LANES, "float32")
    chains = registers(_CHAINS * LANES, "float32")
    sums, acc = registers(LANES, "float32"), registers(s.head_dim, "float32")
    # Values go through memory, here and below. TVM's simplifier replaces each use of a bound value by its expression,
    # which takes minutes, but it leaves loads alone.
    limits = registers(2, "int32")
    store(limits, 0, 1, cast(first, "int32", 1))
    store(limits, 1, 1, cast(last, "int32", 1))
    store(peak, 0, 1, T.float32(_NEVER))
    store(sums, 0, LANES, const(0, "float32", LANES))
    for d in parts:
        store(acc, d, LANES, const(0, "float32", LANES))
    begin = bind(first >> _KEY_LANES_LOG2)
    with T.serial(0, (last >> _KEY_LANES_LOG2) + 1 - begin) as i:
        block = bind(begin + i)
        row = bind((head_blocks + block) * (s.head_dim * KEY_LANES))
        for chain in range(0, _CHAINS * LANES, LANES):
            store(chains, chain, LANES, const(0, "float32", LANES))
        with T.serial(0, T.int64(s.head_dim // LANES)) as part:
            for d in range(LANES):
                at, chain = bind(part * LANES + d), d % _CHAINS * LANES
                query = splat(load(queries, place + at, 1), LANES)
                store(
                    chains,
                    chain,
                    LANES,
                    fma(query, load(keys.flat, row + at * KEY_LANES, KEY_LANES), load(chains, chain, LANES)),
                )
        sides = [load(chains, chain, LANES) + load(chains, chain + LANES, LANES) for chain in (0, 2 * LANES)]
        scores = bind(sides[0] + sides[1])
        if s.cap is not None:
            store(weight, 0, LANES, scores * const(1 / s.cap, "float32", LANES))
            scores = bind(tanh(load(weight, 0, LANES), LANES) * const(s.cap, "float32", LANES))
        positions = bind(T.ramp(cast(block * KEY_LANES, "int32", 1), 1, KEY_LANES))
        low, high = (splat(load(limits, side, 1), LANES) for side in (0, 1))
        scores = bind(T.Select(positions >= low, scores, const(_NEVER, "float32", LANES)))
        scores = bind(T.Select(positions <= high, scores, const(_NEVER, "float32", LANES)))
        before = load(peak, 0, 1)
        store(weight, 0, LANES, scores)
        store(peak, 0, 1, T.max(before, reduce("fmax", scores)))
        now = load(peak, 0, 1)
        fade = exp(splat(before - now, LANES), LANES)
        weights = exp(load(weight, 0, LANES) - splat(now, LANES), LANES)
        store(weight, 0, LANES, weights)
        store(sums, 0, LANES, fma(load(sums, 0, LANES), fade, weights))
        value_row = bind((head_blocks + block) * (KEY_LANES * s.head_dim))
        for d in parts:
            store(acc, d, LANES, load(acc, d, LANES) * fade)
            for j in range(KEY_LANES):
                value = load(values.flat, value_row + j * s.head_dim + d, LANES)
                store(acc, d, LANES, fma(splat(load(weight, j, 1), LANES), value, load(acc, d, LANES)))
    inverse = bind(splat(T.float32(1) / reduce("fadd", load(sums, 0, LANES)), LANES))
    for d in parts:
        store(out.flat, place + d, LANES, load(acc, d, LANES) * inverse)
