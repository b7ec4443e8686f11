"""Compares every tensor of a TVM decoder with the manifest.

The compiled library reads tensors by their place alone, so a tensor of another shape would be read past its end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import BundleError
from .facts import Linear
from .genai_config import Settings, heads_of
from .layout import ROW_BLOCK
from .manifest import Manifest
from .slice_profile import CODE_BITS
from .tensors import PADDING, Entry

_Kind = tuple[str, tuple[int, ...]]
"""Element type and shape; -1 is any number."""

_ROTARY = (".cos", ".sin")
_HEAD_INPUT = "head_input."
_QUERY_GROWTH, _TAPS, _LAYER_SCALAR = "query_growth", "taps", "layer_scalar"
_PER_LAYER, _PER_LAYER_NORM = "per_layer", "model.per_layer_projection_norm"
_DELTA = ("rate", "step", "gain")
"""Last parts of names of what the heads of a delta net are computed with."""
_EXPERTS_OUT = "experts_out"
_HEAD_NORMS = ("q_norm", "k_norm", "query_layernorm", "key_layernorm", "q_layernorm", "k_layernorm", "q_row", "k_row")
"""Last parts of names of norms over each head, and over all heads together."""
_AGAIN = "export the bundle again"


def matrix_kinds(linear: Linear, group_size: int, slices: tuple[int, ...]) -> dict[str, _Kind]:
    """Kinds of the tensors of a matrix in the native layout, by the last part of their names.

    Args:
        linear: the matrix.
        group_size: columns that share a scale.
        slices: bits of each slice.
    """
    blocks = -(-linear.N // ROW_BLOCK)
    weights = blocks * ROW_BLOCK * linear.K
    kinds: dict[str, _Kind] = {
        f"planes_{e}": ("U8", (weights * bits // CODE_BITS,)) for e, bits in enumerate(slices, 1)
    }
    return {**kinds, "scales": ("U8", (blocks, len(slices) + linear.K // group_size, 2 * ROW_BLOCK))}


def check_parameters(path: Path, entries: Mapping[str, Entry], manifest: Manifest, settings: Settings | None) -> None:
    """Check the tensors of ``decoder.safetensors``.

    Args:
        path: the file.
        entries: its tensors by name.
        manifest: the bundle's manifest.
        settings: of the engine; None: widths of heads are not compared.

    Raises:
        BundleError: a tensor is missing or unknown, or has another type or shape; the message names it.
    """
    vocab, hidden = manifest.model.vocab_size, manifest.model.hidden_size
    sides = {"head": (vocab, hidden), "attn_in": (-1, hidden), "mlp_in": (-1, hidden)}
    sides |= {"attn_out": (hidden, -1), "mlp_out": (hidden, -1)}
    sides |= {"conv_in": (3 * hidden, hidden), "conv_out": (hidden, hidden)}
    sides |= {"delta_in": (-1, hidden), "delta_out": (hidden, -1)}
    sides |= {"experts_in": (-1, hidden)}
    sides |= {"ple_embed": (-1, hidden), "ple_in": (-1, hidden), "ple_out": (hidden, -1)}
    for linear in manifest.weights.linears:
        needed = sides.get(linear.name.rpartition(".")[2], (-1, -1))
        if not _fits((linear.N, linear.K), needed):
            raise BundleError(
                f"{path}: {linear.name} is {linear.N} x {linear.K} in the manifest, needed {_shown(needed)} "
                f"for {vocab} tokens and width {hidden}; {_AGAIN}"
            )
    required = dict(_required(manifest))
    for name in required.keys() - entries.keys():
        raise BundleError(f"{path}: {name} has shape none, needed {_shown(required[name][1])}; {_AGAIN}")
    optional = dict(_optional(manifest))
    for name, entry in entries.items():
        kind = required.get(name) or optional.get(name) or _other(name, settings, manifest)
        if entry.dtype != kind[0] or not _fits(entry.shape, kind[1]):
            raise BundleError(
                f"{path}: {name} has type {entry.dtype} and shape {list(entry.shape)}, "
                f"needed {kind[0]} and {_shown(kind[1])}; {_AGAIN}"
            )
    left, right, gain = (entries.get(_HEAD_INPUT + part) for part in ("left", "right", "gain"))
    if left and right and gain and not left.shape[0] * right.shape[0] == math.prod(gain.shape) == hidden:
        raise BundleError(f"{path}: {_HEAD_INPUT}left and right do not make a width of {hidden}; {_AGAIN}")


def _required(manifest: Manifest) -> Iterator[tuple[str, _Kind]]:
    routed, hidden = len(manifest.slices) - 1, manifest.model.hidden_size
    if size := _per_layer_size(manifest):
        # Widths of the projections are as one: the library reads the table's rows for all of them.
        table = Linear(_PER_LAYER, manifest.model.vocab_size, manifest.model.layers * size)
        for part, kind in matrix_kinds(table, manifest.group_size, manifest.slices).items():
            yield f"{_PER_LAYER}.{part}", kind
        yield f"{_PER_LAYER}.rows.scale", ("F32", (table.K,))
        yield _PER_LAYER_NORM, ("F32", (size,))
    for linear in manifest.weights.linears:
        for part, kind in matrix_kinds(linear, manifest.group_size, manifest.slices).items():
            yield f"{linear.name}.{part}", kind
        yield f"{linear.name}.router.table", ("F32", (2, -1))
        yield f"{linear.name}.router.bias", ("F32", (routed,))
        yield f"{linear.name}.router.norm_gain", ("F32", (routed,))
        if experts := _experts(linear, hidden):
            yield f"{linear.name.removesuffix(_EXPERTS_OUT)}chooser", ("F32", (experts, hidden))
    yield "embedding.scale", ("F32", (hidden,))


def _experts(linear: Linear, hidden: int) -> int:
    """How many experts a matrix holds that are what experts put out, one below the other; 0 for another matrix."""
    return linear.N // hidden if linear.name.endswith(f".{_EXPERTS_OUT}") else 0


def _per_layer_size(manifest: Manifest) -> int:
    """Numbers that a token has for each block in the table of per-layer embeddings; 0 where there is none."""
    return max((linear.N for linear in manifest.weights.linears if linear.name.endswith(".ple_in")), default=0)


def _optional(manifest: Manifest) -> Iterator[tuple[str, _Kind]]:
    hidden = manifest.model.hidden_size
    table = Linear("embedding", manifest.model.vocab_size, hidden)
    embedding = matrix_kinds(table, manifest.group_size, manifest.slices)
    yield from ((f"embedding.{part}", kind) for part, kind in embedding.items())
    for linear in manifest.weights.linears:
        yield f"{linear.name}.bias", ("F32", (-(-linear.N // ROW_BLOCK) * ROW_BLOCK,))
        experts = _experts(linear, hidden)
        # Both routers of experts read the residual stream.
        yield f"{linear.name}.router.w1", ("F16", (-1, hidden if experts else linear.K))
        if experts:
            whole = -(-experts // ROW_BLOCK) * ROW_BLOCK
            yield f"{linear.name.removesuffix(_EXPERTS_OUT)}chooser_bias", ("F32", (whole,))
        yield f"{linear.name}.router.b1", ("F32", (-1,))
        yield f"{linear.name}.router.w2", ("F32", (len(manifest.slices) - 1, -1))
    yield _HEAD_INPUT + "gain", ("F32", (hidden,))


def _other(name: str, settings: Settings | None, manifest: Manifest) -> _Kind:
    """The kind of a tensor whose name the manifest does not give: padding, a table, a turn, or a norm."""
    if name.startswith(PADDING):
        return "U8", (-1,)
    if name.endswith(_ROTARY) or name.startswith(_HEAD_INPUT):
        return "F32", (-1, -1)
    if name == _QUERY_GROWTH:
        return "F32", (manifest.model.context_length,)
    last = name.rpartition(".")[2]
    held = manifest.model.states
    if last == _TAPS:
        kept = -2 if settings is None else settings.conv_cache_size
        channels, tokens = held.get("conv") or (manifest.model.hidden_size, kept)
        return "F32", (tokens + 1, channels)
    if held and last in _DELTA:
        heads, _, width = held["recurrent"]
        return "F32", (width if last == "gain" else heads,)
    if last == _LAYER_SCALAR:
        return "F32", (1,)
    if last not in _HEAD_NORMS:
        return "F32", (manifest.model.hidden_size,)
    if settings is None:
        return "F32", (-1,)
    together = {"q_row": settings.heads, "k_row": settings.kv_heads}.get(last, 1)
    block = next((int(part) for part in name.split(".") if part.isdecimal()), -1)
    of = heads_of(manifest, settings).get(block)
    return "F32", (together * (settings.head_dim if of is None else of.head_dim),)


def _fits(shape: tuple[int, ...], needed: tuple[int, ...]) -> bool:
    return len(shape) == len(needed) and all(b in (-1, a) for a, b in zip(shape, needed, strict=True))


def _shown(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join("any" if size < 0 else str(size) for size in shape) + "]"
