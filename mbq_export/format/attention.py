"""Attention over a cache of 8 bits: how keys and values are rounded and stored, and what attention computes from them.

A head's key or value of one token is a row.  It has codes of 8 bits and a float32 scale of its own, so a token's row
does not depend on other tokens, and nothing is calibrated.  Rows lie in blocks of ``KEY_LANES`` tokens: the scales of a
block, then its codes.  The codes of keys are ``[channel][token]``, those of values ``[token][channel]``.  The rows past
the last token may hold anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.layout import KEY_LANES, KV_SCALE_BYTES, whole_blocks
from mbq_targets.constants import SMALLEST_ACTIVATION

from .codes import F32, F64

_STEPS = np.float32(127)


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


def parts(stored: NDArray[np.uint8], *, keys: bool) -> tuple[F32, NDArray[np.int8]]:
    """Views of a cache: its scales and its codes.

    Args:
        stored: uint8 [kv_heads, room, head_dim + KV_SCALE_BYTES]; room is a multiple of ``KEY_LANES``.
        keys: whether it has keys, and not values.

    Returns:
        float32 [kv_heads, room / KEY_LANES, KEY_LANES] and int8 [kv_heads, room / KEY_LANES, KEY_LANES, head_dim].
    """
    heads, room, row = stored.shape
    blocks = stored.reshape(heads, room // KEY_LANES, KEY_LANES * row)
    scales, codes = np.split(blocks, [KEY_LANES * KV_SCALE_BYTES], axis=2)
    head_dim = row - KV_SCALE_BYTES
    of_tokens = codes.view(np.int8).reshape(*blocks.shape[:2], *((head_dim, -1) if keys else (-1, head_dim)))
    return scales.view(np.float32), of_tokens.swapaxes(2, 3) if keys else of_tokens


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
        codes[:, block, lane], scales[:, block, lane] = round_rows(row)


def cached_rows(stored: NDArray[np.uint8], tokens: int, *, keys: bool) -> F32:
    """The rows that a cache stands for.

    Args:
        stored: uint8 [kv_heads, room, head_dim + KV_SCALE_BYTES].
        tokens: that it holds.
        keys: whether these are keys, and not values.

    Returns:
        float32 [tokens, kv_heads, head_dim].
    """
    scales, codes = parts(stored, keys=keys)
    rows = (codes * scales[..., None]).reshape(*stored.shape[:2], -1)
    return rows.swapaxes(0, 1)[:tokens]


def attend(q: F32, keys: F32, values: F32, heads: Heads) -> F64:
    """Attention of the last tokens of a context.

    Args:
        q: float32 [M, query heads, head_dim], rotated queries of the last M tokens.
        keys: float32 [tokens, kv_heads, head_dim], as ``cached_rows`` returns them.
        values: float32 [tokens, kv_heads, head_dim].
        heads: what else it does.

    Returns:
        float64 [M, query heads, head_dim].
    """
    m, count, _ = q.shape
    share = count // heads.kv_heads
    k, v = (np.repeat(rows.astype(np.float64), share, axis=1) for rows in (keys, values))
    scores = np.einsum("mhd,thd->hmt", q.astype(np.float64) * heads.scale, k)
    if heads.cap:
        scores = heads.cap * np.tanh(scores / heads.cap)
    at, place = np.arange(len(keys) - m, len(keys))[:, None], np.arange(len(keys))[None]
    seen = (place <= at) & ((place > at - heads.window) if heads.window else True)
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    return np.asarray(np.einsum("hmt,thd->mhd", weights / weights.sum(axis=2, keepdims=True), v))


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
    rows = []
    for old, cache, new, keys in zip(caches, stored, (k, v), (True, False), strict=True):
        cache[:, : old.shape[1]] = old
        put_rows(cache, tokens, new, keys=keys)
        rows.append(cached_rows(cache, tokens + len(q), keys=keys))
    return attend(q, rows[0], rows[1], heads), stored[0], stored[1]
