"""The page's tokenizer and templates give what Python's give: the same ids, texts and prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nodes
import pytest
from tokenizers_for_tests import KINDS

from mbq_export.model.text_check import CONVERSATIONS
from mbq_runtime.engine.template import ChatTemplate
from mbq_runtime.engine.tokenizer import Tokenizer
from mbq_runtime.errors import MbqError

pytestmark = pytest.mark.heavy

TEXTS = [
    "Hello wörld\n  def f(x): 123456 ¡ñandú!",
    "日本語と中文を混ぜて、한국어도 씁니다。",
    "🙂👩\u200d👧‍👦 🇩🇪 ❤️ ½ ﬁ e\u0301 \u00e9",
    "<|im_start|>user\nI type <|im_end|> and </s> and <s> myself<|im_end|>",
    " a\n\n\n b\t\tc  d   e\r\n",
    "x\u00a0y \u2009z \u200b",
    "it's we'll I'M 3.14159 2024-01-02",
    "<think>a</think><tool_call>{}",
    "مرحبا بالعالم नमस्ते दुनिया",
    "\u0000\u0007 �",
    "",
]
_TYPED = [{"role": "user", "content": "I type <|im_end|>\n<|im_start|>system\n and 🙂 日本語"}]
_CONVERSATIONS: Mapping[str, Any] = {**CONVERSATIONS, "special tokens in a message": (_TYPED, {})}
DIFFERENT = {
    *((family, "content in parts") for family in ("functiongemma", "gemma2", "gemma4", "llama3")),  # trim of a list
    *((family, "a tool call and its result") for family in ("functiongemma", "gemma4")),  # trim of no content
    ("smollm3", "a list of tools"), ("smollm3", "a tool call and its result"),  # the filter string of an object
    ("smollm3", "two turns"),  # lstrip with an argument takes each space
}  # fmt: skip
"""What the library of the page renders in another way.  The page itself sends texts, and no tools."""
FAMILIES = {path.stem: path for path in sorted((nodes.REPO / "tests/data/templates").glob("*.jinja"))}
TOKENIZE = """
const { readFile } = await import("node:fs/promises");
const { Tokenizer } = await import("./src/tokenizer.js");
const json = async path => JSON.parse(await readFile(path, "utf8"));
const found = {};
for (const [name, folder] of Object.entries(given.folders)) {
  const document = await json(`${folder}/tokenizer.json`), config = await json(`${folder}/tokenizer_config.json`);
  const made = new Tokenizer(document, config, null);
  found[name] = {
    opening: made.openingTokens, ids: given.texts.map(text => made.encode(text)),
    pieces: given.texts.map(text => {
      const stream = made.stream();
      return [...made.encode(text).map(id => stream.add(id)), stream.rest()];
    }),
  };
}
return found;
"""
RENDER = """
const { Tokenizer } = await import("./src/tokenizer.js");
const document = {
  model: { type: "BPE", vocab: { a: 0 }, merges: [] }, added_tokens: [],
  normalizer: null, pre_tokenizer: null, post_processor: null, decoder: null,
};
return given.map(({ template, config, messages, options }) => {
  try {
    return new Tokenizer(document, config, template).chatPrompt(messages, options);
  } catch (error) {
    return { error: error.message };
  }
});
"""


def test_ids_and_pieces_of_text_are_those_of_python(tmp_path: Path) -> None:
    for name, kind in KINDS.items():
        kind().save_pretrained(tmp_path / name)
    folders = {name: str(tmp_path / name) for name in KINDS}
    found = nodes.run(TOKENIZE, {"folders": folders, "texts": TEXTS})
    for name, folder in folders.items():
        ours = Tokenizer(Path(folder))
        assert found[name]["opening"] == ours.opening_tokens, name
        for text, ids, pieces in zip(TEXTS, found[name]["ids"], found[name]["pieces"], strict=True):
            assert ids == ours.encode(text), (name, text)
            stream = ours.stream()
            assert pieces == [*(stream.add(token) for token in ids), stream.rest()], (name, text)


def test_prompts_are_those_of_python(tmp_path: Path) -> None:
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    given, wanted, names = [], [], []
    for family, path in FAMILIES.items():
        template = path.read_text(encoding="utf-8")
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
        ours = ChatTemplate(tmp_path)
        for title, (messages, options) in _CONVERSATIONS.items():
            given.append({"template": template, "config": config, "messages": messages, "options": options})
            names.append((family, title))
            try:
                wanted.append(ours.render(messages, options, strict=False))
            except MbqError:
                wanted.append(None)
    found = nodes.run(RENDER, given)
    for name, mine, want in zip(names, found, wanted, strict=True):
        # Where Python's library refuses a conversation, the page's may take it.
        if want is not None:
            assert (mine == want) == (name not in DIFFERENT), name
    assert sum(want is not None for want in wanted) > 140


def test_a_template_that_cannot_be_read_is_told_in_one_line() -> None:
    given = [
        {"template": template, "config": {}, "messages": [{"role": "user", "content": "Hi"}], "options": {}}
        for template in ("{% nonesuch %}", "{{ messages | nonesuch }}", "{{ raise_exception('no system') }}")
    ]
    broken, unknown, refused = (found["error"] for found in nodes.run(RENDER, given))
    assert broken.startswith("this page cannot read the bundle's chat template: ")
    assert broken.endswith("; run the bundle with mbq chat")
    assert unknown.startswith("the chat template does not take this conversation: ")
    assert refused == "the chat template does not take this conversation: no system"
