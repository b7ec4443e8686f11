"""Causal attention on the processor, in blocks of queries.

A block of queries meets only the keys up to its own last token, and the query heads of one key head are rows of one
product.  That is half of the products, without copies of keys and values.  PyTorch's own attention takes twice as long
on processors (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .blocks import fast_products

BLOCK_TOKENS = 64
"""Queries of a block."""
_ELSEWHERE = ("softcap", "s_aux", "position_bias", "cache")
"""Arguments of attention that is not plain: a limit of scores, sinks, biases, pages."""


@contextmanager
def in_blocks() -> Iterator[None]:
    """Let all models attend in blocks where they would use PyTorch's own attention, while the block runs.

    The name of that attention stays: code of models asks for it.
    """
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    AttentionInterface.register("sdpa", attend)
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", before)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it.  What is not causal, or has a mask, is left to PyTorch.

    Args:
        module: the attention module.
        query: [batch, heads, tokens, head_dim].
        key: [batch, kv_heads, tokens, head_dim].
        value: as ``key``; its width may be another.
        attention_mask: None where all earlier tokens are attended to.
        dropout: share of weights that are dropped.
        scaling: factor of the scores; None for the inverse root of ``head_dim``.
        is_causal: False where later tokens are attended to.
        more: further arguments of the family.

    Returns:
        [batch, tokens, heads, head_dim], and None for the weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    plain = attention_mask is None and is_causal is not False and not dropout and getattr(module, "is_causal", True)
    whole = query.shape[2] == key.shape[2] > 1 and query.device.type == "cpu"
    if not (plain and whole) or any(more.get(name) is not None for name in _ELSEWHERE):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **more
        )
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    fast = torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", enabled=False):
        out: torch.Tensor = _InBlocks.apply(query.float() * factor, key.float(), value.float(), fast)  # type: ignore[no-untyped-call]
        return out.to(query.dtype).transpose(1, 2), None


class _InBlocks(torch.autograd.Function):
    """Weighted means of values, and their gradients."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, fast: bool) -> torch.Tensor:
        """Attend.

        Args:
            ctx: keeps what the backward pass needs.
            query: float32 [batch, heads, tokens, head_dim], scaled.
            key: float32 [batch, kv_heads, tokens, head_dim].
            value: float32 [batch, kv_heads, tokens, width].
            fast: whether products may be fast.

        Returns:
            float32 [batch, heads, tokens, width].
        """
        rows, keys, values = _by_key_head(query, key), key.flatten(0, 1), value.flatten(0, 1)
        out = values.new_empty(*rows.shape[:3], values.shape[-1])
        later = torch.full((BLOCK_TOKENS, BLOCK_TOKENS), -torch.inf).triu_(1)
        weights = []
        with fast_products(query.device, wanted=fast):
            for at, end in _blocks(rows.shape[2]):
                block = rows[:, :, at:end]
                tokens = block.shape[2]
                scores = torch.bmm(block.flatten(1, 2), keys[:, :end].mT).unflatten(1, (-1, tokens))
                scores[..., at:end] += later[:tokens, :tokens]
                weights.append(scores.softmax(-1).flatten(1, 2))
                out[:, :, at:end] = torch.bmm(weights[-1], values[:, :end]).unflatten(1, (-1, tokens))
        ctx.fast = fast
        ctx.save_for_backward(query, key, value, out, *weights)
        mixed: torch.Tensor = out.view(*query.shape[:3], -1)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        """Gradients of query, key and value.

        Args:
            ctx: what the forward pass kept.
            gradient: float32 [batch, heads, tokens, width].
        """
        query, key, value, out, *weights = ctx.saved_tensors
        rows, keys, values = _by_key_head(query, key), key.flatten(0, 1), value.flatten(0, 1)
        of_out = _by_key_head(gradient, key)
        of_rows, of_keys, of_values = (torch.zeros_like(x) for x in (rows, keys, values))
        # A row's weights have the sum 1, so their common part has no gradient.
        common = (of_out * out).sum(-1, keepdim=True)
        with fast_products(query.device, wanted=ctx.fast):
            for (at, end), weight in zip(_blocks(rows.shape[2]), weights, strict=True):
                block = of_out[:, :, at:end].flatten(1, 2)
                of_values[:, :end] += torch.bmm(weight.mT, block)
                of_scores = torch.bmm(block, values[:, :end].mT).sub_(common[:, :, at:end].flatten(1, 2)).mul_(weight)
                of_rows[:, :, at:end] = torch.bmm(of_scores, keys[:, :end]).unflatten(1, (-1, end - at))
                of_keys[:, :end] += torch.bmm(of_scores.mT, rows[:, :, at:end].flatten(1, 2))
        return of_rows.view_as(query), of_keys.view_as(key), of_values.view_as(value), None


def _by_key_head(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Queries by the key head that they use: [batch * kv_heads, heads / kv_heads, tokens, width]."""
    batch, kv_heads, tokens, _ = key.shape
    return query.reshape(batch * kv_heads, -1, tokens, query.shape[-1])


def _blocks(tokens: int) -> list[tuple[int, int]]:
    """First token and end of each block."""
    return [(at, min(at + BLOCK_TOKENS, tokens)) for at in range(0, tokens, BLOCK_TOKENS)]
