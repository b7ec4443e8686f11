"""The texts to measure on: long enough, apart from what is calibrated on, and written once by the model itself."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import write_checkpoint

from mbq_export.data import corpora, replies, texts
from mbq_export.model.checkpoint import Checkpoint
from mbq_export.model.loading import load
from mbq_export.model.source import locate
from mbq_export.progress import no_report
from mbq_runtime.cache import CACHE_VARIABLE
from mbq_runtime.errors import ModelError, UsageError

ENOUGH = 24 * 512
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system prompt') }}{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture
def checkpoint(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    found = load(locate(str(folder)))
    found.tokenizer.chat_template = TEMPLATE
    return found


def long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) > 60}


def test_packaged_texts_are_long_enough_and_not_calibrated_on() -> None:
    fitted = long_lines(corpora.wikipedia("calibration")) | long_lines(corpora.wikipedia("validation"))
    seen: set[str] = set()
    for name, read in texts.PACKAGED.items():
        content = read()
        assert len(content) > 6 * ENOUGH, name  # a token of these texts has fewer than 6 characters on average
        assert len(long_lines(content)) > 200, name
        assert not long_lines(content) & (fitted | seen), name
        seen |= long_lines(content)


def test_code_is_that_of_the_running_python() -> None:
    assert "def heappush(heap, item):" in corpora.code("evaluation")
    assert corpora.code("evaluation") == corpora.code("evaluation")


def test_code_is_read_and_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's Python has turtle, and not the tkinter that it imports."""
    monkeypatch.setitem(sys.modules, "tkinter", None)
    monkeypatch.delitem(sys.modules, "turtle", raising=False)
    assert "class RawTurtle" in corpora.code("calibration")
    assert "turtle" not in sys.modules


def test_a_python_without_sources_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(UsageError, match=r"its module bisect .*--calib-data FILE"):
        corpora.code("evaluation")


def test_held_back_prompts() -> None:
    prompts = json.loads(replies.HELD_BACK.read_text(encoding="utf-8"))
    assert set(prompts) == set(replies.KINDS) == set(texts.SAID)
    assert len(set(prompts["chat"])) == 48
    assert replies._ENOUGH_TOKENS > ENOUGH
    assert all(chat["system"] and len(chat["turns"]) > 2 for chat in prompts["conversation"])
    turns = [turn for chat in prompts["conversation"] for turn in chat["turns"]]
    assert len({*turns, *prompts["chat"]}) == len(turns) + 48


def few_prompts(monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    """Six prompts of each kind, and short replies in batches of six, until there are 2000 tokens."""
    whole = json.loads(replies.HELD_BACK.read_text(encoding="utf-8"))
    prompts = {kind: chats[:6] for kind, chats in whole.items()}
    file = folder / "prompts.json"
    file.write_text(json.dumps(prompts), encoding="utf-8")
    for name, value in (("HELD_BACK", file), ("_BATCH", 6), ("_REPLY_TOKENS", 8), ("_ENOUGH_TOKENS", 2000)):
        monkeypatch.setattr(replies, name, value)
    return prompts


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.heavy) if kind == "conversation" else kind for kind in replies.KINDS]
)
def test_replies_are_written_once(
    checkpoint: Checkpoint, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = few_prompts(monkeypatch, tmp_path)[kind]
    before = torch.random.get_rng_state()
    said = texts.SAID[kind](checkpoint, no_report)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(checkpoint.tokenizer(said)["input_ids"]) >= 2000
    for chat in prompts:
        for line in [chat] if isinstance(chat, str) else [*chat["turns"]]:
            assert f"<user>{line}\n<assistant>" in said
    assert said.startswith("<user>" if kind == "chat" else f"<system>{prompts[0]['system']}\n<user>")
    (file,) = (tmp_path / "cache" / "replies").iterdir()
    monkeypatch.setattr(checkpoint.model, "generate", None)
    assert texts.SAID[kind](checkpoint, no_report) == said
    file.unlink()
    monkeypatch.undo()
    few_prompts(monkeypatch, tmp_path)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "other"))
    assert texts.SAID[kind](checkpoint, no_report) == said
    with torch.no_grad():
        next(checkpoint.model.parameters()).add_(1)
    texts.SAID[kind](checkpoint, no_report)
    assert len(list((tmp_path / "other" / "replies").iterdir())) == 2, "another model has other replies"


def test_a_chat_ends_where_the_context_does(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "_ENOUGH_TOKENS", 1)
    monkeypatch.setattr(checkpoint, "decoder", replace(checkpoint.decoder, context_length=240))
    generate, lengths = checkpoint.model.generate, []

    def watched(**options: Any) -> torch.Tensor:
        found: torch.Tensor = generate(**options)
        lengths.append(found.shape[1])
        return found

    monkeypatch.setattr(checkpoint.model, "generate", watched)
    said = texts.SAID["conversation"](checkpoint, no_report)
    assert max(lengths) <= 240
    assert 0 < said.count("<assistant>") < 3 * 18


def test_a_template_that_refuses_a_system_prompt(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "_ENOUGH_TOKENS", 1)
    monkeypatch.setattr(replies, "_REPLY_TOKENS", 2)
    checkpoint.tokenizer.chat_template = STRICT + TEMPLATE
    said = texts.SAID["conversation"](checkpoint, no_report)
    assert "<user>You are a patient teacher of mathematics. You explain one step at a time.\n\nWhat is a frac" in said
    checkpoint.tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(ModelError, match="refuses a plain chat: never"):
        texts.SAID["chat"](checkpoint, no_report)
    checkpoint.tokenizer.chat_template = None
    with pytest.raises(ModelError, match="text chat: the tokenizer of llama has no chat template"):
        texts.SAID["chat"](checkpoint, no_report)
