"""A model whose prompts or tokens would differ on the board is refused before its weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hostile_templates import HOSTILE
from tiny_models import write_checkpoint
from tokenizers_for_tests import KINDS
from transformers import AutoTokenizer

from mbq_export.model import text_check
from mbq_export.model.loading import check_tokens, read_config
from mbq_export.model.source import locate
from mbq_runtime.engine.template import ChatTemplate
from mbq_runtime.engine.tokenizer import TextStream, Tokenizer
from mbq_runtime.errors import ModelError

TEMPLATES = Path(__file__).parents[1] / "data/templates"
PLAIN = "{% for m in messages %}{{ m.role ~ ':' ~ m.content ~ '<eos>\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.fixture
def tokenizer(checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.heavy) if kind == "published_smollm2" else kind for kind in KINDS]
)
def test_every_kind_of_tokenizer_passes(kind: str) -> None:
    text_check.check_text(KINDS[kind](), "m")


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "mistral-v0.3", "hermes"])
def test_families_pass(tokenizer: Any, family: str) -> None:
    """Also those that refuse some conversations."""
    tokenizer.chat_template = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    text_check.check_text(tokenizer, "m")


def test_there_are_eight_conversations() -> None:
    assert len(text_check.CONVERSATIONS) == 8


@pytest.mark.parametrize("what", text_check.CONVERSATIONS)
def test_a_different_prompt_is_named(tokenizer: Any, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, wanted = ChatTemplate.render, text_check.CONVERSATIONS[what][0]

    def differs(self: ChatTemplate, messages: Any, options: Any, *, strict: bool) -> str:
        text = honest(self, messages, options, strict=strict)
        return text.replace(":", "=", 1) if messages is wanted else text

    monkeypatch.setattr(ChatTemplate, "render", differs)
    tokenizer.chat_template = PLAIN
    with pytest.raises(ModelError) as caught:
        text_check.check_text(tokenizer, "m")
    message = str(caught.value)
    assert message.startswith(f"m: the chat template differs between the board and transformers for {what}: it gives ")
    assert message.endswith("; report this model")


def test_one_side_fails(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer.chat_template = PLAIN

    def fails(*_: Any, **__: Any) -> str:
        raise ValueError("no\nmore")

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", fails)
    with pytest.raises(ModelError, match="for one turn: one of them fails: no; report this model"):
        text_check.check_text(tokenizer, "m")


@pytest.mark.parametrize("template", ["{{ nothing.more }}", "{{", "{{ raise_exception('never') }}"])
def test_a_template_that_never_works(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match=r"m: the chat template fails for one turn: .*; repair it, or remove it"):
        text_check.check_text(tokenizer, "m")


def test_a_hostile_template_is_not_given_to_transformers(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(HOSTILE["nested ranges"])
    for file in checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    source = locate(str(tmp_path))
    with pytest.raises(ModelError, match=r"cannot be used: the chat template takes too long"):
        check_tokens(source, read_config(source))


def test_other_tokens(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: [1])
    with pytest.raises(ModelError, match=r"m: the board would read .Hello wörld, .* as other tokens"):
        text_check.check_text(tokenizer, "m")


def test_another_text(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextStream, "rest", lambda self: "!")
    with pytest.raises(ModelError, match=r"m: the board would show the tokens of .Hello .*, transformers as .Hello"):
        text_check.check_text(tokenizer, "m")


def test_no_file_for_the_board(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tokenizer), "save_pretrained", lambda self, folder: None)
    with pytest.raises(ModelError, match=r"m: a board cannot read its tokenizer: tokenizer.json: .* No such file"):
        text_check.check_text(tokenizer, "m")
