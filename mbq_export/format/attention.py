"""Attention over a cache of 8 bits: how keys and values are rounded and stored, and what attention computes from them.

A head's key or value of one token is a row.  ``spread`` mixes its channels, so that a channel with large numbers does
not take all the steps.  Then the row has codes of 8 bits and a float32 scale of its own.  So a token's row does not
depend on other tokens, and nothing is calibrated.

Rows lie in blocks of ``KEY_LANES`` tokens: the scales of a block, then its codes.  A stored byte is a code plus 128.
Integer products take four bytes at a time, so the bytes of keys are ``[channel / 4][token][channel % 4]``, and those of
values ``[token / 4][channel][token % 4]``.  The rows past the last token may hold anything.

Queries are spread too, and rounded as keys are.  The kernels also round the weights of values: those of
``WEIGHT_TOKENS`` neighbouring tokens, times the scales of the values, to ``WEIGHT_STEPS`` steps of the largest.  The
scale of a value counts as 2**-60 at least.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.layout import KEY_LANES, KV_SCALE_BYTES, whole_blocks
from mbq_targets.constants import SMALLEST_ACTIVATION, WEIGHT_STEPS, WEIGHT_TOKENS

from .codes import F32, F64

_STEPS = np.float32(127)
_OFFSET = 128
_LEAST_VALUE_SCALE = np.float32(2**-60)


@dataclass(frozen=True)
class Heads:
    """What attention does besides its products.

    kv_heads: heads of keys and of values; neighbouring query heads share one.
    scale: multiplies q . k.
    window: tokens that a token sees, itself included; 0 for all.
    cap: soft cap of the scores; 0 for none.
    """

    kv_heads: int
    scale: float
    window: int = 0
    cap: float = 0


def rotate(x: F32, cos: F32, sin: F32) -> F32:
    """Rotate the first channels of heads: channel i with channel i + R / 2.

    Args:
        x: float32 [tokens, heads, head_dim].
        cos: float32 [tokens, R / 2].
        sin: float32 [tokens, R / 2].

    Returns:
        float32, of the shape of ``x``.
    """
    half = cos.shape[1]
    a, b, rest = np.split(x, [half, 2 * half], axis=2)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=2)


def spread_width(head_dim: int) -> int:
    """How many neighbouring channels ``spread`` mixes: the largest power of two that divides a head.

    Args:
        head_dim: channels of a head.
    """
    return head_dim & -head_dim


def spread(x: F32) -> F32:
    """The Hadamard transform of each ``spread_width`` channels, not divided by its length.

    Products of two spread rows are ``spread_width`` times those of the rows.  So is a row that is spread twice.

    Args:
        x: float32 [..., head_dim].

    Returns:
        float32, of the shape of ``x``.
    """
    half = 1
    while half < spread_width(x.shape[-1]):
        a, b = np.moveaxis(x.reshape(*x.shape[:-1], -1, 2, half), -2, 0)
        x = np.stack([a + b, a - b], axis=-2).reshape(x.shape)
        half *= 2
    return x


def round_rows(x: F32) -> tuple[NDArray[np.int8], F32]:
    """Round rows to codes of -127 to 127 times the row's scale.  A row below 1e-30 counts as zero.

    Args:
        x: float32 [..., head_dim].

    Returns:
        int8 codes of the shape of ``x``, and float32 scales [...].
    """
    peak = np.abs(x).max(axis=-1)
    peak = np.where(peak >= np.float32(SMALLEST_ACTIVATION), peak, np.float32(0))
    inverse = np.divide(_STEPS, peak, out=np.zeros_like(peak), where=peak > 0)
    return np.rint(x * inverse[..., None]).astype(np.int8), (peak / _STEPS).astype(np.float32)


def parts(stored: NDArray[np.uint8], *, keys: bool) -> tuple[F32, NDArray[np.uint8]]:
    """Views of a cache: its scales and its stored bytes.

    Args:
        stored: uint8 [kv_heads, room, head_dim + KV_SCALE_BYTES]; room is a multiple of ``KEY_LANES``.
        keys: whether it has keys, and not values.

    Returns:
        float32 [kv_heads, room / KEY_LANES, KEY_LANES]; and uint8 [kv_heads, room / KEY_LANES, KEY_LANES, head_dim / 4,
        4] of keys, or [kv_heads, room / KEY_LANES, KEY_LANES / 4, 4, head_dim] of values.
    """
    heads, room, row = stored.shape
    blocks = stored.reshape(heads, room // KEY_LANES, KEY_LANES * row)
    scales, codes = np.split(blocks, [KEY_LANES * KV_SCALE_BYTES], axis=2)
    fours = codes.reshape(*blocks.shape[:2], -1, KEY_LANES if keys else row - KV_SCALE_BYTES, 4)
    return scales.view(np.float32), fours.swapaxes(2, 3) if keys else fours.swapaxes(3, 4)


def put_rows(stored: NDArray[np.uint8], first: int, x: F32, *, keys: bool) -> None:
    """Round rows and put them into a cache.

    Args:
        stored: uint8 [kv_heads, room, head_dim + KV_SCALE_BYTES].
        first: the token of the first row.
        x: float32 [tokens, kv_heads, head_dim].
        keys: whether these are keys, and not values.
    """
    scales, codes = parts(stored, keys=keys)
    for token, row in enumerate(x, first):
        block, lane = divmod(token, KEY_LANES)
        rounded, scales[:, block, lane] = round_rows(spread(row))
        raised = rounded.view(np.uint8) ^ _OFFSET
        if keys:
            codes[:, block, lane] = raised.reshape(len(raised), -1, 4)
        else:
            codes[:, block, lane // 4, lane % 4] = raised


def cached_rows(stored: NDArray[np.uint8], tokens: int, *, keys: bool) -> F32:
    """The rows that a cache stands for, as they were spread.

    Args:
        stored: uint8 [kv_heads, room, head_dim + KV_SCALE_BYTES].
        tokens: that it holds.
        keys: whether these are keys, and not values.

    Returns:
        float32 [tokens, kv_heads, head_dim].
    """
    return np.asarray(cached_codes(stored, tokens, keys=keys) * cached_scales(stored, tokens, keys=keys)[..., None])


def cached_scales(stored: NDArray[np.uint8], tokens: int, *, keys: bool) -> F32:
    """The scales of a cache's rows.

    Args:
        stored: uint8 [kv_heads, room, head_dim + KV_SCALE_BYTES].
        tokens: that it holds.
        keys: whether these are keys, and not values.

    Returns:
        float32 [tokens, kv_heads].
    """
    scales, _ = parts(stored, keys=keys)
    of_tokens = scales.reshape(len(stored), -1).T[:tokens]
    return of_tokens if keys else np.maximum(of_tokens, _LEAST_VALUE_SCALE)


def cached_codes(stored: NDArray[np.uint8], tokens: int, *, keys: bool) -> NDArray[np.int8]:
    """The codes of a cache's rows.

    Args:
        stored: uint8 [kv_heads, room, head_dim + KV_SCALE_BYTES].
        tokens: that it holds.
        keys: whether these are keys, and not values.

    Returns:
        int8 [tokens, kv_heads, head_dim].
    """
    _, raised = parts(stored, keys=keys)
    codes = (raised ^ _OFFSET).view(np.int8).reshape(*stored.shape[:2], -1)
    return codes.swapaxes(0, 1)[:tokens]


def attend(q: F32, keys: F32, values: tuple[NDArray[np.int8], F32], heads: Heads) -> F64:
    """Attention of the last tokens of a context.

    Args:
        q: float32 [M, query heads, head_dim], rotated queries of the last M tokens.
        keys: float32 [tokens, kv_heads, head_dim], spread, as ``cached_rows`` returns them.
        values: as ``cached_codes`` and ``cached_scales`` return them.
        heads: what else it does.

    Returns:
        float64 [M, query heads, head_dim].
    """
    m, count, head_dim = q.shape
    width = spread_width(head_dim)
    k, v, v_scales = (np.repeat(x.astype(np.float64), count // heads.kv_heads, axis=1) for x in (keys, *values))
    codes, scales = round_rows(spread(q))
    scores = np.einsum("mhd,thd->hmt", codes * (scales * (heads.scale / width))[..., None], k)
    if heads.cap:
        scores = heads.cap * np.tanh(scores / heads.cap)
    at, place = np.arange(len(keys) - m, len(keys))[:, None], np.arange(len(keys))[None]
    seen = (place <= at) & ((place > at - heads.window) if heads.window else True)
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    factors = round_weights(weights * v_scales.T[:, None])
    mixed = np.einsum("hmt,thd->mhd", factors / weights.sum(axis=2, keepdims=True), v)
    return np.asarray(spread(mixed) / width)


def round_weights(weights: F64) -> F64:
    """Round weights of values.

    Args:
        weights: float64 [..., tokens], times the scales of the values.

    Returns:
        float64, of the shape of ``weights``: whole steps.
    """
    rounded = []
    for first in range(0, weights.shape[-1], WEIGHT_TOKENS):
        part = weights[..., first : first + WEIGHT_TOKENS]
        step = np.maximum(part.max(axis=-1, keepdims=True), np.finfo(np.float64).tiny) / WEIGHT_STEPS
        rounded.append(np.rint(part / step) * step)
    return np.concatenate(rounded, axis=-1)


def cached_attention(
    q: F32, k: F32, v: F32, past: tuple[NDArray[np.uint8], NDArray[np.uint8], int], heads: Heads
) -> tuple[F64, NDArray[np.uint8], NDArray[np.uint8]]:
    """Op ``CachedAttention`` without its rotation: put tokens into the cache behind those that it holds, and attend.

    Args:
        q: float32 [M, query heads, head_dim], rotated.
        k: float32 [M, kv_heads, head_dim], rotated.
        v: float32 [M, kv_heads, head_dim].
        past: keys and values, uint8 [kv_heads, room, head_dim + KV_SCALE_BYTES], and how many tokens they hold.
        heads: what else it does.

    Returns:
        float64 [M, query heads, head_dim], and the keys and values, with room for all tokens.
    """
    *caches, tokens = past
    room = max(caches[0].shape[1], whole_blocks(tokens + len(q)))
    stored = [np.zeros((len(old), room, old.shape[2]), np.uint8) for old in caches]
    for old, cache, new, keys in zip(caches, stored, (k, v), (True, False), strict=True):
        cache[:, : old.shape[1]] = old
        put_rows(cache, tokens, new, keys=keys)
    held, (of_keys, of_values) = tokens + len(q), stored
    values = cached_codes(of_values, held, keys=False), cached_scales(of_values, held, keys=False)
    return attend(q, cached_rows(of_keys, held, keys=True), values, heads), of_keys, of_values
