"""A bundle small enough to build in a test, and real enough for the engine to load and run.

The tokenizer has three special tokens and one token per byte.  The decoder is an embedding, one grouped-query attention
and a head with a fixed successor for each token: after a newline it says "Hi, wörld!" and ends; A to G follow each
other in a circle.  Logits grow with the budget.  ``avg_bits_used`` is the budget plus a thousandth of the mean token id
of the pass, so that tests can tell passes apart.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mbq_runtime.bundle import manifest
from mbq_runtime.bundle.facts import Budget, ModelFacts, RouterFacts, TargetFacts, Weights
from mbq_runtime.bundle.genai_config import genai_config
from mbq_runtime.bundle.listed_files import file_entries

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS = 2
VOCAB = 264
HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 16
CONTEXT = 96
REPLY = "Hi, wörld!"
CIRCLE = "ABCDEFG"

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def ids(text: str) -> list[int]:
    """The tokens of ``text``, which must hold no special token."""
    return [byte + len(SPECIAL) for byte in text.encode()]


def _byte_names() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def write_tokenizer(folder: Path, *, bos: bool = False) -> None:
    vocab = {name: i for i, name in enumerate((*SPECIAL, *_byte_names()))}
    added = [
        {"id": i, "content": text, "special": True, "normalized": False,
         "lstrip": False, "rstrip": False, "single_word": False}
        for i, text in enumerate(SPECIAL)
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    opening = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": SPECIAL[1], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {SPECIAL[1]: {"id": SPECIAL[1], "ids": [1], "tokens": [SPECIAL[1]]}},
    }
    tokenizer: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": opening if bos else None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocab, "merges": []},
    }  # fmt: skip
    config = {
        "tokenizer_class": "TokenizersBackend",
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[2],
        **({"add_bos_token": True} if bos else {}),
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def successors() -> NDArray[np.int64]:
    """int64 [VOCAB]: which token follows which."""
    following = (np.arange(VOCAB) + 1) % VOCAB
    reply = [*ids("\n" + REPLY), EOS]
    following[reply[:-1]] = reply[1:]
    circle = ids(CIRCLE)
    following[circle] = circle[1:] + circle[:1]
    return following


def write_model(path: Path, context: int = CONTEXT) -> None:
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((VOCAB, HIDDEN)).astype(np.float32)
    head = np.zeros((HIDDEN, VOCAB), np.float32)
    for token, following in enumerate(successors()):
        head[:, following] += embedding[token] * 20 / HIDDEN
    angles = np.arange(context)[:, None] * 10000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)[None]
    constants: dict[str, NDArray[Any]] = {
        "embedding": embedding,
        "head": head,
        "wq": rng.standard_normal((HIDDEN, HEADS * HEAD_DIM)).astype(np.float32) / HIDDEN,
        "wk": rng.standard_normal((HIDDEN, KV_HEADS * HEAD_DIM)).astype(np.float32) / HIDDEN,
        "wv": rng.standard_normal((HIDDEN, KV_HEADS * HEAD_DIM)).astype(np.float32) / HIDDEN,
        "wo": rng.standard_normal((HEADS * HEAD_DIM, HIDDEN)).astype(np.float32) / HIDDEN,
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
        "one": np.array([1], np.int32),
        "axis": np.array([1], np.int64),
        "zero": np.array([0], np.int64),
        "last": np.array(1, np.int64),
        "minus_one": np.array([-1], np.int64),
        "end": np.array([2**62], np.int64),
        "per_full_bits": np.array([1 / 8], np.float32),
        "thousandth": np.array([1 / 1000], np.float32),
    }
    node = helper.make_node
    attention_inputs = ["q", "k", "v", "past_key_values.0.key", "past_key_values.0.value", "before", "total"]
    nodes = [
        node("Gather", ["embedding", "input_ids"], ["x"]),
        node("Cast", ["attention_mask"], ["mask"], to=TensorProto.INT32),
        node("ReduceSum", ["mask", "axis"], ["length"], keepdims=0),
        node("Sub", ["length", "one"], ["before"]),
        node("Shape", ["attention_mask"], ["mask_shape"]),
        node("Gather", ["mask_shape", "last"], ["total64"]),
        node("Cast", ["total64"], ["total"], to=TensorProto.INT32),
        *(node("MatMul", ["x", f"w{name}"], [name]) for name in "qkv"),
        node("GroupQueryAttention", [*attention_inputs, "cos", "sin"], ["a", "present.0.key", "present.0.value"],
             domain="com.microsoft", num_heads=HEADS, kv_num_heads=KV_HEADS, do_rotary=1),
        node("MatMul", ["a", "wo"], ["o"]),
        node("Add", ["x", "o"], ["h"]),
        node("Slice", ["avg_bits", "zero", "axis"], ["budget"]),
        node("Mul", ["budget", "per_full_bits"], ["gain"]),
        node("Slice", ["h", "minus_one", "end", "axis"], ["last_h"]),
        node("MatMul", ["last_h", "head"], ["raw"]),
        node("Mul", ["raw", "gain"], ["logits"]),
        node("Shape", ["input_ids"], ["seq"], start=1),
        node("Sub", ["seq", "scored"], ["first"]),
        node("Slice", ["h", "first", "end", "axis"], ["scored_h"]),
        node("MatMul", ["scored_h", "head"], ["all_raw"]),
        node("Mul", ["all_raw", "gain"], ["all_logits"]),
        node("Cast", ["input_ids"], ["ids"], to=TensorProto.FLOAT),
        node("Mul", ["ids", "thousandth"], ["small"]),
        node("ReduceMean", ["small"], ["mean"], keepdims=0),
        node("Add", ["budget", "mean"], ["avg_bits_used"]),
    ]  # fmt: skip
    value = helper.make_tensor_value_info
    cache: list[int | str | None] = ["batch", KV_HEADS, "past", HEAD_DIM]
    inputs = [
        value("input_ids", TensorProto.INT64, ["batch", "seq"]),
        value("attention_mask", TensorProto.INT64, ["batch", "total"]),
        value("avg_bits", TensorProto.FLOAT, [2]),
        value("scored", TensorProto.INT64, [1]),
        *(value(f"past_key_values.0.{part}", TensorProto.FLOAT, cache) for part in ("key", "value")),
    ]
    outputs = [
        value("logits", TensorProto.FLOAT, ["batch", 1, VOCAB]),
        value("all_logits", TensorProto.FLOAT, ["batch", "scored", VOCAB]),
        *(value(f"present.0.{part}", TensorProto.FLOAT, cache) for part in ("key", "value")),
        value("avg_bits_used", TensorProto.FLOAT, [1]),
    ]
    graph = helper.make_graph(
        nodes, "tiny", inputs, outputs, [numpy_helper.from_array(array, name) for name, array in constants.items()]
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def facts() -> manifest.Manifest:
    """The tiny bundle's manifest, without its files."""
    return manifest.Manifest(
        model=ModelFacts("tiny", "LlamaForCausalLM", "llama", 50_000, VOCAB, HIDDEN, 1, CONTEXT),
        target=TargetFacts("portable", "onnx", "any", "", ()),
        slices=(3, 1, 2, 2),
        group_size=64,
        layout="nbits",
        budget=Budget(3.0, 8.0, 8.0),
        router=RouterFacts("norm", 24),
        weights=Weights(0, {"3": 3000, "8": 8000}, ()),
        calibration={"windows": 4},
        seed=0,
        tools={"mbq_export": "0.1.0"},
        files=(),
    )


def write_manifest(folder: Path, base: manifest.Manifest | None = None) -> None:
    manifest.write(replace(base or facts(), files=file_entries(folder)), folder)


def write_bundle(folder: Path, *, bos: bool = False, chunk: int = 8, context: int = CONTEXT) -> Path:
    """A whole bundle; prompts run in chunks of ``chunk`` tokens."""
    folder.mkdir(parents=True)
    write_tokenizer(folder, bos=bos)
    write_model(folder / "model.onnx", context)
    config = genai_config(
        family="llama", vocab_size=VOCAB, context_length=context, layers=1, hidden_size=HIDDEN, heads=HEADS,
        kv_heads=KV_HEADS, head_dim=HEAD_DIM, eos_token_ids=[EOS], bos_token_id=1, native=False,
    )  # fmt: skip
    config["search"]["chunk_size"] = chunk
    (folder / "genai_config.json").write_text(json.dumps(config))
    made = facts()
    write_manifest(folder, replace(made, model=replace(made.model, context_length=context)))
    return folder
