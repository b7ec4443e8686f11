"""The bounds that an export keeps its memory to."""

from __future__ import annotations

import ctypes
import sys

from mbq_runtime.bundle.isa import this_machine

from .methods import CONTEXT_TOKENS
from .model.shape import Decoder

KEPT_ACTIVATION_BYTES = 2 << 30
"""Most activations of a window that are kept for a backward pass.  Larger ones are computed again block by block."""

KEPT_WEIGHT_BYTES = 2 << 30
"""Most float32 weights that are kept in memory.  A larger model's weights are kept in a file."""

ROUTER_INPUT_BYTES = 3 << 29
"""Most inputs that are kept to fit learned routers to."""

_DELTA_CHUNK = 64
"""Tokens that transformers takes at once through a delta net."""
_PAIR_COPIES, _HEAD_COPIES, _MEMORY_COPIES = 6, 8, 3
"""How often a backward pass through a delta net keeps what it computes of pairs of tokens, of heads and of memories."""

TABLE_WEIGHTS_AT_ONCE = 1 << 22
"""Weights of a table of per-layer embeddings that are rounded at once."""

ROUNDING_BYTES = 48 * TABLE_WEIGHTS_AT_ONCE
"""Most bytes of the float64 numbers that this takes."""

WEIGHTS_AT_ONCE = 1 << 26
"""Most weights that are rotated or sliced at once.  A larger matrix is worked on some rows at a time."""


KEPT_FREE_BYTES = 512 << 20
"""Most free memory that the heap keeps for the next blocks.  ``give_back`` returns it after each stage."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of ``mallopt``, from glibc's ``malloc.h``."""


def reuse_freed() -> None:
    """Let the heap use freed memory again, for large blocks too.

    glibc gets a block of more than 32 MB from the system, and gives it back at once.  The system fills new pages with
    zeros, which takes longer than most operations on logits.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, KEPT_FREE_BYTES)
        mallopt(_TRIM_THRESHOLD, KEPT_FREE_BYTES)


def give_back() -> None:
    """Return free heap memory to the system.

    glibc keeps free memory that lies below a block in use: up to a quarter of what a stage holds.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def fast_bytes() -> int:
    """Bytes of a number in fast products: 2 (bfloat16) where the processor multiplies it, else 4."""
    return 4 if this_machine().features.isdisjoint({"avx512_bf16", "amx_bf16"}) else 2


def activation_bytes(decoder: Decoder) -> int:
    """Bytes that a backward pass keeps of one window's forward pass: inputs, outputs and attention weights in float32.

    Args:
        decoder: the model.
    """
    widths = sum((2 * n + 2 * k) * count for (_, (n, k)), count in decoder.token_counts.items())
    widths += decoder.heads * CONTEXT_TOKENS * decoder.layers_of("attn_in")
    return 4 * CONTEXT_TOKENS * (widths + _delta_width(decoder) * decoder.layers_of("delta_in"))


def _delta_width(decoder: Decoder) -> int:
    """Numbers that a delta net keeps for each token: of pairs within a chunk, of the heads, and of the memories."""
    if (delta := decoder.delta) is None:
        return 0
    of_heads = _HEAD_COPIES * (delta.key_dim + delta.value_dim)
    memories = _MEMORY_COPIES * delta.key_dim * delta.value_dim // _DELTA_CHUNK
    return delta.value_heads * (_PAIR_COPIES * _DELTA_CHUNK + of_heads + memories)


def router_input_bytes(decoder: Decoder, tokens: int) -> int:
    """Bytes of the inputs of every unit's router in float16.

    Args:
        decoder: the model.
        tokens: number of tokens.
    """
    return 2 * tokens * sum(decoder.router_widths().values())
