"""Tiny checkpoints, and what a hostile or damaged one may look like.  A seeded generator draws every mutation."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from changes import HOSTILE_VALUES, damage, make_odd, mutate_json, mutate_safetensors
from gguf import GGUFValueType, GGUFWriter
from hostile_templates import HOSTILE
from tiny_models import TINIEST, write_checkpoint
from tokenizers import pre_tokenizers

FAMILIES = ("llama", "qwen3", "gemma3_text", "phi3-longrope")
WIDTHS = {"phi3-longrope": {"hidden_size": 128}}  # its tables of positions are for heads of 64
ROWS, HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 264, 64, 128, 2, 4, 2, 16

CONFIG_KEYS: dict[str, Any] = {
    "rope_scaling": {"rope_type": "yarn", "factor": -2.0},
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 0},
    "rope_theta": 0,
    "auto_map": {"AutoConfig": "x.Y"},
    "quantization_config": {"quant_method": "fp8"},
    "dtype": "float7",
    "layer_types": ["full_attention"],
    "sliding_window": 0,
    "use_sliding_window": True,
    "attention_bias": True,
    "final_logit_softcapping": 30.0,
    "partial_rotary_factor": 7,
    "transformers_version": [],
    "id2label": {"a": "b"},
    "torch_dtype": 5,
    "is_encoder_decoder": True,
    "pruned_heads": {"0": "x"},
    "text_config": {"num_hidden_layers": 10**9},
}
"""Keys that a config may get, with a value that is wrong for the tiny models."""


def write_folder(folder: Path, draw: random.Random, originals: Path) -> Path:
    """A whole checkpoint of some family.

    Args:
        folder: where to write it.
        draw: the generator.
        originals: a folder that keeps one checkpoint of each family.
    """
    family = draw.choice(FAMILIES)
    if not (originals / family).exists():
        write_checkpoint(originals / family, family, **{**TINIEST, **WIDTHS.get(family, {})})
    return Path(shutil.copytree(originals / family, folder))


def _json_file(name: str) -> Callable[[Path, random.Random], None]:
    return lambda folder, draw: mutate_json(folder / name, draw)


def config_keys(folder: Path, draw: random.Random) -> None:
    """One to three keys of config.json get a wrong value."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for _ in range(draw.randint(1, 3)):
        if draw.random() < 0.3:
            name = draw.choice(list(CONFIG_KEYS))
            config[name] = CONFIG_KEYS[name]
        else:
            config[draw.choice(list(config))] = copy.deepcopy(draw.choice(HOSTILE_VALUES))
    path.write_text(json.dumps(config), encoding="utf-8")


def any_bytes(folder: Path, draw: random.Random) -> None:
    """Damage one file of the folder."""
    damage(draw.choice(sorted(folder.iterdir())), draw, 4096)


def safetensors_header(folder: Path, draw: random.Random) -> None:
    """The header of the weights gets a wrong value, and its right length."""
    mutate_safetensors(folder / "model.safetensors", draw)


def template(folder: Path, draw: random.Random) -> None:
    """A chat template that takes time or memory, or fails."""
    (folder / "chat_template.jinja").write_text(draw.choice(list(HOSTILE.values())), encoding="utf-8")


def odd_files(folder: Path, draw: random.Random) -> None:
    """A file is missing, empty, a folder, a pipe, or a link to a device."""
    make_odd(draw.choice(sorted(folder.iterdir())), draw)


FOLDER_MUTATIONS: dict[str, Callable[[Path, random.Random], None]] = {
    "keys of config.json": config_keys,
    "values of config.json": _json_file("config.json"),
    "values of tokenizer.json": _json_file("tokenizer.json"),
    "values of tokenizer_config.json": _json_file("tokenizer_config.json"),
    "values of generation_config.json": _json_file("generation_config.json"),
    "bytes of any file": any_bytes,
    "header of safetensors": safetensors_header,
    "template": template,
    "odd files": odd_files,
}


def _gguf_values() -> dict[str, tuple[GGUFValueType, Any]]:
    kind = GGUFValueType
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*symbols, "<bos>", "<eos>", symbols[0] + symbols[1], *(f"<unused{i}>" for i in range(5))]
    types = [1] * 256 + [3, 3, 1] + [5] * 5
    return {
        "llama.context_length": (kind.UINT32, 512),
        "llama.embedding_length": (kind.UINT32, HIDDEN),
        "llama.block_count": (kind.UINT32, LAYERS),
        "llama.feed_forward_length": (kind.UINT32, FFN),
        "llama.attention.head_count": (kind.UINT32, HEADS),
        "llama.attention.head_count_kv": (kind.UINT32, KV_HEADS),
        "llama.attention.layer_norm_rms_epsilon": (kind.FLOAT32, 1e-5),
        "llama.rope.dimension_count": (kind.UINT32, HEAD_DIM),
        "llama.rope.freq_base": (kind.FLOAT32, 10000.0),
        "llama.vocab_size": (kind.UINT32, ROWS),
        "tokenizer.ggml.model": (kind.STRING, "gpt2"),
        "tokenizer.ggml.pre": (kind.STRING, "gpt-2"),
        "tokenizer.ggml.tokens": (kind.ARRAY, tokens),
        "tokenizer.ggml.token_type": (kind.ARRAY, types),
        "tokenizer.ggml.merges": (kind.ARRAY, [f"{symbols[0]} {symbols[1]}"]),
        "tokenizer.ggml.bos_token_id": (kind.UINT32, 256),
        "tokenizer.ggml.eos_token_id": (kind.UINT32, 257),
    }


def _gguf_shapes() -> dict[str, tuple[int, ...]]:
    kv = KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (ROWS, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        in_block = {
            "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN),
            "attn_v": (kv, HIDDEN), "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (FFN, HIDDEN), "ffn_up": (FFN, HIDDEN),
            "ffn_down": (HIDDEN, FFN),
        }  # fmt: skip
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in in_block.items()}
    return shapes


_GGUF_TYPES = {
    bool: GGUFValueType.BOOL, int: GGUFValueType.INT64, float: GGUFValueType.FLOAT64, str: GGUFValueType.STRING,
}  # fmt: skip
_GGUF_HOSTILE: tuple[Any, ...] = (
    True, -1, 0, 1, 3, 10**9, 2**62, 0.0, -0.5, 1e300, float("nan"), float("inf"), "", "x", "\x1b[31m", [0], ["a", "b"],
    [1, 2, 3], [-1] * ROWS, ["x"] * ROWS,
)  # fmt: skip


def write_gguf(path: Path, draw: random.Random | None = None) -> None:
    """A tiny model in one GGUF file.

    Args:
        path: the file.
        draw: changes metadata and shapes, unless it is None.
    """
    values, shapes, numbers = _gguf_values(), _gguf_shapes(), np.random.default_rng(0)
    if draw is not None:
        for _ in range(draw.randint(1, 2)):
            _change_gguf(values, shapes, draw)
    writer = GGUFWriter(path, "llama")
    for key, (kind, value) in values.items():
        writer.add_key_value(key, value, kind)
    for name, shape in shapes.items():
        writer.add_tensor(name, numbers.normal(0, 0.05, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _change_gguf(
    values: dict[str, tuple[GGUFValueType, Any]], shapes: dict[str, tuple[int, ...]], draw: random.Random
) -> None:
    if draw.random() < 0.2:
        name = draw.choice(list(shapes))
        shape = shapes.pop(name)
        if draw.random() < 0.7:
            shapes[name] = draw.choice((shape[::-1], (1,), (*shape, 2), tuple(2 * side for side in shape)))
        return
    known = ["llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.attention.sliding_window", "split.count"]
    key = draw.choice([*values, *known, "tokenizer.chat_template", "llama.attention.key_length"])
    if key in values and draw.random() < 0.15:
        del values[key]
        return
    value = draw.choice(_GGUF_HOSTILE)
    values[key] = (GGUFValueType.ARRAY if isinstance(value, list) else _GGUF_TYPES[type(value)], value)


def hostile_options(draw: random.Random) -> list[str]:
    """One or two options of the command with a value that is likely wrong."""
    numbers = ("-1", "0", "1", "1e9", str(10**30), str(2**63), "nan", "inf", "-inf", "x", "", "\N{THAI DIGIT ONE}")
    choices = {
        "--seed": numbers,
        "--floor-ratio": numbers,
        "--calib-tokens": numbers,
        "--tune-steps": numbers,
        "--group-size": ("48", "128", "auto", "-64", "x"),
        "--slices": ("auto", "8", "1,1,1,1,1,1,1,1", "", ",", "9,-1", "3,1,2,2,0", "a" * 10000),
        "--target": ("", "x", "../x", "host", "arm64"),
        "--engine": ("tvm", "both", "x"),
        "--device": ("cpu:9", "meta", "", "x", "cuda", "mps:1"),
        "--router": ("mlp", "x"),
        "--activations": ("4", "8", "x"),
        "--output": ("", "/", ".", "/proc/x/y", "/dev/null/x", "n" * 300, "\x1b[31m"),
        "--calib-data": ("", "/dev/zero", "/proc/self/mem", "/", "n" * 5000, "hf:"),
        "--model": ("", "/", "n" * 5000, "/dev/zero", "smollm2", "a/b/c"),
        "--plot": ("x", "x.svg/y.png", "/dev/null/x.png"),
    }
    found = []
    for option in draw.sample(list(choices), draw.choice((1, 1, 2))):
        found += [option, draw.choice(choices[option])]
    return found
