"""The engine gives the same tokens as transformers for tokenizer files that transformers wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tiny_bundle import write_bundle, write_manifest
from tokenizers_for_tests import published_smollm2

from mbq_runtime import Engine

TEXTS = [
    "Hello wörld\n  def f(x): 123456 <|im_end|> ¡ñandú! 日本語 🙂",
    " a\n\n\n b\t\tc  d   e\r\n",
    "x\u00a0y \u2009z",
    "it's we'll I'M 3.14159 2024-01-02",
    "e\u0301 \u00e9",
    "def f(a, b):\n    return a+b  # sum\n" * 4,
]


GEMMA_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}"
    "{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ (first if loop.first else '') + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def gemma() -> Any:
    """A small tokenizer of Gemma's kind: words with the space before them, and bytes where there is no word."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trained.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Split("\u2581", "merged_with_next")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, limit_alphabet=60, special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    )
    trained.train_from_iterator(Path(__file__).read_text(encoding="utf-8").splitlines(), trainer)
    model = json.loads(trained.to_str())["model"]
    tokenizer = transformers.GemmaTokenizer(
        vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], add_bos_token=True
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special[-2:]})
    tokenizer.chat_template = GEMMA_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module", params=[pytest.param(published_smollm2, marks=pytest.mark.heavy), gemma])
def original(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.fixture(scope="module")
def engine(original: Any, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The tiny bundle with this tokenizer's files."""
    folder = write_bundle(tmp_path_factory.mktemp("tokenizer") / "bundle")
    original.save_pretrained(folder)
    write_manifest(folder)
    return Engine.load(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_same_tokens(engine: Engine, original: Any, text: str) -> None:
    assert engine.encode(text) == original.encode(text, add_special_tokens=False)
    assert engine.encode(text, add_bos=True) == original.encode(text, add_special_tokens=True)


def test_same_chat_prompt(engine: Engine, original: Any) -> None:
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": 'say "ö"\n\\n'},
        {"role": "assistant", "content": "ö"},
        {"role": "user", "content": "again"},
    ]
    for messages in (talk, talk[1:2]):
        rendered = original.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert engine.chat_prompt(messages) == rendered
