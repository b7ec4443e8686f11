"""The contents of ``genai_config.json``, by which onnxruntime-genai runs a bundle's model."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BundleError, ModelError
from .facts import STATES, BlockHeads
from .file_names import OPS_LIBRARY
from .layout import KV_SCALE_BYTES, kv_row_bytes, whole_blocks
from .manifest import Manifest
from .reading import read_json
from .schema import decode

FILE = "genai_config.json"

PROMPT_CHUNK = 128
"""Prompt tokens of one pass.

Other threads, Ctrl-C and a new budget take effect between two passes.  The attention scores of a pass grow with it.
Longer passes were measured to gain little: see docs/log.md."""

# Families the engine knows by name; any other decoder runs under its generic name.
_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

# A decoder with short convolutions runs under the name of the family that the engine knows them of.
_CONVOLUTIONS = "lfm2"

_MOST_BYTES = 1 << 20
_MOST_CHUNK = 8192  # tokens
_MOST_KEPT = 64  # tokens of a convolution


def genai_config(
    *,
    family: str,
    vocab_size: int,
    context_length: int,
    layers: int,
    hidden_size: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    eos_token_ids: Sequence[int],
    bos_token_id: int | None = None,
    pad_token_id: int | None = None,
    native: bool,
    convolutions: Collection[int] = (),
    conv_cache_size: int = 0,
    deltas: bool = False,
    kv_bits: int = 32,
) -> dict[str, Any]:
    """What onnxruntime-genai must know of a decoder with this project's inputs and outputs.

    ``avg_bits`` and ``avg_bits_used`` have no entry: the engine sets and reads them by name.

    Args:
        family: ``model_type`` of the checkpoint.
        vocab_size: token ids the model knows.
        context_length: tokens of prompt and reply together.
        layers: decoder blocks.
        hidden_size: width of the residual stream.
        heads: query heads of a block.
        kv_heads: key and value heads of a block.
        head_dim: width of a head.
        eos_token_ids: ids that end a reply; at least one, each below ``vocab_size``.
        bos_token_id: id that opens a text, if the model has one.
        pad_token_id: None for the first of ``eos_token_ids``.
        native: the bundle has an ops library.  Its path is relative to the bundle, so that the folder can be moved.
        convolutions: blocks that have a short convolution in place of attention.
        conv_cache_size: tokens that a convolution keeps.
        deltas: whether there are blocks that have a delta net in place of attention.
        kv_bits: bits of a cached key or value.  With 8, the engine gives a cache of bytes in whole blocks.

    Raises:
        ModelError: ``eos_token_ids`` is empty or has an id outside the vocabulary.
    """
    eos = list(eos_token_ids)
    if not eos or not all(0 <= token < vocab_size for token in eos):
        raise ModelError(
            f"end-of-text token ids {eos}: needed at least one, each from 0 to {vocab_size - 1}; "
            "set eos_token_id in the model's generation_config.json"
        )
    ids = {"bos_token_id": bos_token_id, "pad_token_id": eos[0] if pad_token_id is None else pad_token_id}
    inputs, outputs, more = dict[str, str](), dict[str, str](), dict[str, Any]()
    if convolutions:
        inputs, outputs = {"past_conv_names": "past.%d.conv"}, {"present_conv_names": "present.%d.conv"}
        kinds = ["conv" if layer in convolutions else "full_attention" for layer in range(layers)]
        more = {"layer_types": kinds, "conv_cache_size": conv_cache_size}
    if deltas:
        inputs, outputs = (
            {f"{when}_{state}_names": f"{when}.%d.{state}" for state in STATES} for when in ("past", "present")
        )
    if kv_bits == 8:
        context_length, head_dim = whole_blocks(context_length), kv_row_bytes(head_dim, kv_bits)
    return {
        "model": {
            "type": _CONVOLUTIONS if convolutions else family if family in _MODEL_TYPES else "decoder",
            **{name: value for name, value in ids.items() if value is not None},
            "eos_token_id": eos,
            "vocab_size": vocab_size,
            "context_length": context_length,
            "decoder": {
                "filename": "model.onnx",
                "session_options": {
                    "log_id": "mbq",
                    "provider_options": [],
                    **({"custom_ops_library": OPS_LIBRARY} if native else {}),
                },
                "hidden_size": hidden_size,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "head_size": head_dim,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                    **inputs,
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                    **outputs,
                },
                **more,
            },
        },
        "search": {
            "do_sample": False,
            "max_length": context_length,
            "num_beams": 1,
            "past_present_share_buffer": True,
            "chunk_size": PROMPT_CHUNK,
        },
    }


@dataclass(frozen=True)
class Settings:
    """The values of ``genai_config.json`` that the manifest does not have.

    heads: query heads of a block.
    kv_heads: key and value heads of a block.
    head_dim: width of a head.
    eos_token_ids: ids that end a reply.
    bos_token_id: id that opens a text, or None.
    pad_token_id: id that fills a batch.
    chunk_size: prompt tokens of one pass.
    conv_cache_size: tokens that a short convolution keeps; 0 where there is none.
    """

    heads: int
    kv_heads: int
    head_dim: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None
    chunk_size: int
    conv_cache_size: int = 0

    def document(self, manifest: Manifest) -> dict[str, Any]:
        """What ``genai_config.json`` says for these values.  Nothing else is given to an engine.

        Args:
            manifest: the bundle's manifest.
        """
        model = manifest.model
        written = genai_config(
            family=model.family,
            vocab_size=model.vocab_size,
            context_length=model.context_length,
            layers=model.layers,
            hidden_size=model.hidden_size,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            eos_token_ids=self.eos_token_ids,
            bos_token_id=self.bos_token_id,
            pad_token_id=self.pad_token_id,
            native=manifest.ops_library is not None,
            convolutions=convolutions(manifest),
            conv_cache_size=self.conv_cache_size,
            deltas=bool(manifest.model.states),
            kv_bits=manifest.kv_bits,
        )
        written["search"]["chunk_size"] = self.chunk_size
        return written


def convolutions(manifest: Manifest) -> tuple[int, ...]:
    """The blocks that have a short convolution in place of attention.

    Args:
        manifest: the bundle's manifest.
    """
    return _blocks_with(manifest, "conv_in")


def states(manifest: Manifest, settings: Settings) -> dict[str, tuple[int, ...]]:
    """What a block without attention keeps from pass to pass: the shape of each state by its name.

    Args:
        manifest: the bundle's manifest.
        settings: of the same bundle.
    """
    if convolutions(manifest):
        return {"conv": (manifest.model.hidden_size, settings.conv_cache_size)}
    held = manifest.model.states
    return {name: held[name] for name in STATES if name in held}


def keeping(manifest: Manifest) -> tuple[int, ...]:
    """The blocks that have ``states`` in place of keys and values.

    Args:
        manifest: the bundle's manifest.
    """
    return convolutions(manifest) or _blocks_with(manifest, "delta_in")


def _blocks_with(manifest: Manifest, role: str) -> tuple[int, ...]:
    parts = (linear.name.split(".") for linear in manifest.weights.linears)
    return tuple(int(part[1]) for part in parts if part[-1] == role and len(part) == 3 and part[1].isdecimal())


def heads_of(manifest: Manifest, settings: Settings) -> dict[int, BlockHeads]:
    """The heads of the blocks with attention, by index of the block.

    Args:
        manifest: the bundle's manifest.
        settings: of the same bundle.
    """
    if manifest.model.attention:
        return dict(enumerate(manifest.model.attention))
    kept, shape = keeping(manifest), (settings.kv_heads, settings.head_dim)
    return {layer: BlockHeads(layer, *shape) for layer in range(manifest.model.layers) if layer not in kept}


def caches(manifest: Manifest, settings: Settings) -> dict[int, BlockHeads]:
    """The heads of the blocks that have keys and values of their own, by index of the block.

    Args:
        manifest: the bundle's manifest.
        settings: of the same bundle.
    """
    return {layer: of for layer, of in heads_of(manifest, settings).items() if of.source == layer}


def cache_bytes(manifest: Manifest, settings: Settings) -> int:
    """Bytes of the keys and values of one token.

    Args:
        manifest: the bundle's manifest.
        settings: of the same bundle.
    """
    own = caches(manifest, settings).values()
    return 2 * sum(of.kv_heads * kv_row_bytes(of.head_dim, manifest.kv_bits) for of in own)


def state_bytes(manifest: Manifest, settings: Settings) -> int:
    """Bytes of the float32 states of one context, whatever its length.

    Args:
        manifest: the bundle's manifest.
        settings: of the same bundle.
    """
    return 4 * len(keeping(manifest)) * sum(map(math.prod, states(manifest, settings).values()))


@dataclass(frozen=True)
class _Decoder:
    num_attention_heads: int
    num_key_value_heads: int
    head_size: int


@dataclass(frozen=True)
class _Model:
    eos_token_id: tuple[int, ...]
    decoder: _Decoder


@dataclass(frozen=True)
class _Search:
    chunk_size: int


@dataclass(frozen=True)
class _Document:
    model: _Model
    search: _Search


def read_settings(folder: Path, manifest: Manifest) -> Settings:
    """Read ``genai_config.json``.  Each value must be one that the exporter writes.

    Args:
        folder: folder of the bundle.
        manifest: the bundle's manifest.

    Raises:
        BundleError: a value is missing, is out of range, or is one that the exporter does not write.
    """
    path = folder / FILE
    document = read_json(path, _MOST_BYTES)
    found = decode(_Document, document, path)
    model, decoder = document["model"], found.model.decoder
    settings = Settings(
        heads=decoder.num_attention_heads,
        kv_heads=decoder.num_key_value_heads,
        head_dim=decoder.head_size - (0 if manifest.kv_bits == 32 else KV_SCALE_BYTES),
        eos_token_ids=found.model.eos_token_id,
        bos_token_id=_token_id(path, model, "bos_token_id"),
        pad_token_id=_token_id(path, model, "pad_token_id"),
        chunk_size=found.search.chunk_size,
        conv_cache_size=_conv_cache_size(path, document),
    )
    _check(path, settings, manifest)
    if difference := next(_differences(document, settings.document(manifest), ""), None):
        raise BundleError(f"{path}: {difference}; export the bundle again")
    return settings


def _conv_cache_size(path: Path, document: Mapping[str, Any]) -> int:
    value = document["model"]["decoder"].get("conv_cache_size", 0)
    if type(value) is not int or not 0 <= value <= _MOST_KEPT:
        raise BundleError(
            f"{path}: model.decoder.conv_cache_size is {_shown(value)}, needed 0 to {_MOST_KEPT}; "
            "export the bundle again"
        )
    return value


def _token_id(path: Path, model: Mapping[str, Any], name: str) -> int | None:
    value = model.get(name)
    if value is not None and type(value) is not int:
        raise BundleError(f"{path}: model.{name} is not a whole number; export the bundle again")
    return value


def _check(path: Path, settings: Settings, manifest: Manifest) -> None:
    vocab = manifest.model.vocab_size
    eos = settings.eos_token_ids
    rules: list[tuple[bool, str, object, str]] = [
        (0 < settings.chunk_size <= _MOST_CHUNK, "search.chunk_size", settings.chunk_size, f"1 to {_MOST_CHUNK}"),
        *(
            (value > 0, f"model.decoder.{name}", value, "above 0")
            for name, value in (
                ("num_attention_heads", settings.heads),
                ("num_key_value_heads", settings.kv_heads),
                ("head_size", settings.head_dim),
            )
        ),
        (bool(eos), "model.eos_token_id", list(eos), "at least one token id"),
        *((0 <= token < vocab, "model.eos_token_id", token, f"0 to {vocab - 1}") for token in eos),
        *_fits(settings, manifest),
    ]
    for holds, field, seen, needed in rules:
        if not holds:
            raise BundleError(f"{path}: {field} is {seen!r}, needed {needed}; export the bundle again")


def _fits(settings: Settings, manifest: Manifest) -> Iterator[tuple[bool, str, object, str]]:
    """Rules that hold between the heads and the manifest's matrices, as (holds, field, value, needed)."""
    if settings.kv_heads > 0:
        whole = settings.heads % settings.kv_heads == 0
        needed = f"a multiple of num_key_value_heads {settings.kv_heads}"
        yield whole, "model.decoder.num_attention_heads", settings.heads, needed
    model, linears = manifest.model, manifest.weights.linears
    hidden = model.hidden_size
    shapes = {"head": (model.vocab_size, hidden), "conv_in": (3 * hidden, hidden), "conv_out": (hidden, hidden)}
    shapes |= _delta_shapes(manifest)
    alike = BlockHeads(0, settings.kv_heads, settings.head_dim)
    # By the names of blocks where they differ; else any block's.
    blocks_of = {f"layers.{layer}.": (layer, of) for layer, of in enumerate(model.attention)} or {"": (0, alike)}
    gated: dict[str, list[int]] = {}
    for prefix, (layer, of) in blocks_of.items():
        rows = (settings.heads + (2 * of.kv_heads if of.source == layer else 0)) * of.head_dim
        shapes |= {f"{prefix}attn_in": (rows, hidden), f"{prefix}attn_out": (hidden, settings.heads * of.head_dim)}
        # A gate for each head, or for each of its channels.
        gated[f"{prefix}attn_in"] = [rows + settings.heads * gates for gates in (1, of.head_dim)]
    for linear in linears:
        role = linear.name.rpartition(".")[2]
        name = linear.name if linear.name in shapes else role
        shape = (0, 0) if role.startswith("attn_") and name not in shapes else shapes.get(name)
        if linear.N in gated.get(name, ()):
            shape = (linear.N, hidden)
        if shape is not None:
            yield shape == (linear.N, linear.K), f"shape for {linear.name}", shape, f"{(linear.N, linear.K)}"
    blocks = sum(linear.name.endswith((".attn_in", ".conv_in", ".delta_in")) for linear in linears)
    if linears:
        yield blocks == model.layers, "model.layers", model.layers, f"{blocks}, the manifest's attn_in matrices"
    held = bool(convolutions(manifest)) == (settings.conv_cache_size > 0)
    yield held, "model.decoder.conv_cache_size", settings.conv_cache_size, "above 0 where there are convolutions alone"


def _delta_shapes(manifest: Manifest) -> dict[str, tuple[int, int]]:
    """(N, K) of the matrices of a delta net, which follow from its states; 0 where there are none."""
    held, hidden = manifest.model.states, manifest.model.hidden_size
    if not held:
        return {"delta_in": (0, 0), "delta_out": (0, 0)}
    (channels, _), (heads, _, width) = held["conv"], held["recurrent"]
    values = heads * width
    return {"delta_in": (channels + values + 2 * heads, hidden), "delta_out": (hidden, values)}


def _differences(seen: Any, needed: Any, field: str) -> Iterator[str]:
    """Each place where two JSON documents differ, in words."""
    if isinstance(seen, dict) and isinstance(needed, dict):
        for key in [*needed, *(key for key in seen if key not in needed)]:
            name = f"{field}.{key}" if field else key
            if key not in needed:
                yield f"{name[:120]} is {_shown(seen[key])}, which mbq-export does not write"
            elif key not in seen:
                yield f"{name} is missing"
            else:
                yield from _differences(seen[key], needed[key], name)
    elif type(seen) is not type(needed) or seen != needed:
        yield f"{field} is {_shown(seen)}, needed {needed!r}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
