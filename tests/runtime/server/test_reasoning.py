"""Reasoning is divided from the answer, has a budget, and is free of grammars."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import needs
import openai
import pytest
from forked_mbq import Mbq
from serving import serve
from tiny_bundle import TEMPLATE, write_manifest

from mbq_runtime import Engine, UsageError
from mbq_runtime.engine.reasoning import MARKS, Marks, Reasoning, Thought, find_marks
from mbq_runtime.server.divide import Divider
from mbq_runtime.server.tool_format import Call
from mbq_runtime.server.tools import FORMATS

THINK = MARKS[0]
OPENS, CLOSES = 259, 260  # ids of the two marks
ASSISTANT = "{{ '<|im_start|>assistant\n' }}"
SWITCH = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% else %}<think>{% endif %}"


@pytest.fixture(scope="module")
def thinking_bundle(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with a token for each mark.  Its template begins the reasoning."""
    folder = tmp_path_factory.mktemp("thinking") / "bundle"
    shutil.copytree(bundle, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    same = {"special": False, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    marks = ((OPENS, THINK.opens), (CLOSES, THINK.closes))
    tokenizer["added_tokens"] += [{"id": token, "content": mark, **same} for token, mark in marks]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace(ASSISTANT, ASSISTANT + SWITCH))
    write_manifest(folder)
    return folder


@pytest.fixture(scope="module")
def thinking(thinking_bundle: Path) -> Iterator[openai.OpenAI]:
    with (
        serve(Engine.load(thinking_bundle, threads=1)) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=30) as client,
    ):
        yield client


# The model ends its reasoning at once where it may.
ASK: dict[str, Any] = {
    "model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": 0,
    "logit_bias": {str(CLOSES): -100},
}  # fmt: skip


def test_a_reasoning_ends_at_its_budget(thinking: openai.OpenAI) -> None:
    for budget in (0, 1, 5):
        found = thinking.chat.completions.create(**ASK, max_tokens=12, extra_body={"reasoning_budget": budget})
        message = found.choices[0].message.model_dump()
        assert bool(message.get("reasoning_content")) == (budget > 0)
        assert "think>" not in message["content"] + message.get("reasoning_content", "")
        assert found.usage is not None
        assert found.usage.completion_tokens_details is not None
        assert found.usage.completion_tokens_details.reasoning_tokens == budget + 1
    free = thinking.chat.completions.create(**ASK, max_tokens=12, extra_body={"reasoning_budget": -1})
    assert free.choices[0].message.content == ""
    assert free.usage is not None
    assert free.usage.completion_tokens == 12


def test_a_stream_divides_likewise(thinking: openai.OpenAI) -> None:
    whole = thinking.chat.completions.create(**ASK, max_tokens=12, extra_body={"reasoning_budget": 5})
    thoughts, texts = "", ""
    for chunk in thinking.chat.completions.create(
        **ASK, max_tokens=12, stream=True, extra_body={"reasoning_budget": 5}
    ):
        delta = chunk.choices[0].delta.model_dump()
        assert not (texts and delta.get("reasoning_content"))
        thoughts, texts = thoughts + (delta.get("reasoning_content") or ""), texts + (delta.get("content") or "")
    message = whole.choices[0].message.model_dump()
    assert (thoughts, texts) == (message["reasoning_content"], message["content"])


def test_a_grammar_holds_after_the_reasoning(thinking: openai.OpenAI) -> None:
    needs.module("llguidance")
    asked = {"reasoning_budget": 4, "structured_outputs": {"regex": "[0-9]{6}"}}
    found = thinking.chat.completions.create(**ASK, max_tokens=20, extra_body=asked).choices[0]
    assert re.fullmatch("[0-9]{6}", found.message.content or "")
    assert found.message.model_dump()["reasoning_content"]
    assert found.finish_reason == "stop"


@pytest.mark.parametrize("how", [{"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}])
def test_a_reasoning_can_be_turned_off(thinking: openai.OpenAI, how: dict[str, Any]) -> None:
    found = thinking.chat.completions.create(**ASK, max_tokens=5, extra_body=how)
    assert "reasoning_content" not in found.choices[0].message.model_dump()
    assert found.usage is not None
    assert found.usage.completion_tokens_details is not None
    assert found.usage.completion_tokens_details.reasoning_tokens == 0


def test_a_reply_may_open_its_reasoning_before_a_grammar(thinking_bundle: Path) -> None:
    needs.module("llguidance")
    from mbq_runtime.engine import Grammar

    engine, wanted = Engine.load(thinking_bundle, threads=1), Grammar("regex", "ABC")
    options: dict[str, Any] = {"grammar": wanted, "reasoning_budget": 3, "max_tokens": 20}
    # A hundred more than any other token has; the end has less.
    opened = engine.generate("x", chat=False, logit_bias={OPENS: 100.0, CLOSES: -100.0}, **options)
    opened.text()
    assert opened.stats.tokens[0] == OPENS
    assert opened.stats.tokens[4] == CLOSES
    assert engine.decode(opened.stats.tokens[5:]) == "ABC"
    engine.speculate = "on"
    guessed = engine.generate("x", chat=False, logit_bias={OPENS: 100.0, CLOSES: -100.0}, **options)
    guessed.text()
    assert guessed.stats.tokens == opened.stats.tokens
    assert engine.generate("x", chat=False, logit_bias={OPENS: -100.0}, **options).text() == "ABC"


def test_bad_budgets(thinking: openai.OpenAI, thinking_bundle: Path, engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(openai.BadRequestError, match="reasoning_budget"):
        thinking.chat.completions.create(**ASK, extra_body={"reasoning_budget": -2})
    with pytest.raises(openai.BadRequestError, match="thinking_budget: not supported"):
        thinking.chat.completions.create(**ASK, extra_body={"thinking_budget": 5})
    with pytest.raises(UsageError, match="reasoning_budget -1: needed 0 or above"):
        engine.generate("A", reasoning_budget=-1)
    assert engine.generate("A", chat=False, max_tokens=2, reasoning_budget=0).text() == "BC"  # it has no reasoning
    copy = Path(shutil.copytree(thinking_bundle, tmp_path / "copy"))
    template = (copy / "chat_template.jinja").read_text().replace("<think>", "[THINK]").replace("</think>", "[/THINK]")
    (copy / "chat_template.jinja").write_text(template)
    write_manifest(copy)
    with pytest.raises(UsageError, match=r"has no token for \[/THINK\]; leave it out"):
        Engine.load(copy, threads=1).generate("A", reasoning_budget=5)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    ("text", "thought", "answer", "calls"),
    [
        ("<think>a<b\n</think>\n\nHi </think>", "a<b\n", "Hi </think>", 0),
        ("\n<think></think>Hi", "", "Hi", 0),
        ("<thin ice", "", "<thin ice", 0),
        ("  Hi <think>", "", "  Hi <think>", 0),
        ("<think>never ends </thi", "never ends </thi", "", 0),
        ('<think>x</think>\n<tool_call>{"name": "f", "arguments": {}}</tool_call>', "x", "", 1),
        ("<|channel>thought\na thought<channel|>Hi", "a thought", "Hi", 0),
        ("<|channel>thought\n<channel|><|tool_call>call:f{}<tool_call|>", "", "", 1),
        ("<|channel>thou", "thou", "", 0),
        ("<|channel>though not<channel|>", "though not", "", 0),
    ],
)
def test_reasoning_text_and_calls_however_the_text_is_cut(
    text: str, thought: str, answer: str, calls: int, size: int
) -> None:
    marks, family = THINK, "hermes"
    if "channel" in text:
        marks, family = MARKS[2], "gemma4"
    divider, found = Divider(marks, FORMATS[family]), []
    for at in range(0, len(text), size):
        found += divider.feed(text[at : at + size], last=at + size >= len(text))
    thoughts = [piece for piece in found if isinstance(piece, Thought)]
    texts = [piece for piece in found if isinstance(piece, str) and not isinstance(piece, Thought)]
    assert ("".join(thoughts), "".join(texts)) == (thought, answer)
    assert len([piece for piece in found if isinstance(piece, Call)]) == divider.calls == calls


def test_marks_are_seen_in_the_template() -> None:
    assert find_marks("{{ '<think>' + x + '</think>' }}") == THINK
    assert find_marks("[THINK]{{ x }}[/THINK]") == Marks("[THINK]", "[/THINK]")
    assert find_marks("{{ '<|channel>thought\\n<channel|>' }}") == MARKS[2]
    assert find_marks(TEMPLATE) is None


def test_the_command_ends_a_reasoning(thinking_bundle: Path, mbq: Mbq) -> None:
    command = ["run", thinking_bundle, "hi", "--max-tokens"]
    done = mbq([*command, 4, "--json", "--reasoning-budget", 0])
    assert json.loads(done.out)["tokens"][0] == CLOSES
    bad = mbq([*command, 4, "--json", "--reasoning-budget", -1])
    assert (bad.code, "reasoning_budget -1: needed 0 or above" in bad.err) == (2, True)
    schema = thinking_bundle.parent / "schema.json"
    schema.write_text('{"const": 12345}')
    needs.module("llguidance")
    done = mbq([*command, 20, "--json-schema", schema])
    assert done.code == 0, done.err
    assert json.loads(done.out) == 12345


@pytest.mark.parametrize("before", [[], [9], [9, 8], [9, 9, 9, 8]])
def test_white_space_may_stand_before_a_reasoning(before: list[int]) -> None:
    """As the text of the reply is divided.  Tokens: 1 opens, 2 closes, 8 and 9 are white space."""
    reasoning = Reasoning(1, 2, begun=False, budget=2, blank=lambda token: token in (8, 9))
    for token in before:
        assert reasoning.may_open == 1
        assert not reasoning.accept(token)
    assert reasoning.accept(1)
    assert reasoning.accept(5)
    assert reasoning.accept(9)
    assert reasoning.forced == 2
    assert reasoning.accept(2)
    assert not reasoning.accept(9)
    assert reasoning.may_open is None


def test_nothing_else_stands_before_a_reasoning() -> None:
    reasoning = Reasoning(1, 2, begun=False, budget=2, blank=lambda token: token == 9)
    assert [reasoning.accept(token) for token in (9, 5, 1)] == [False, False, False]
