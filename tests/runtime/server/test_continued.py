"""A last message of the model is continued, in all formats; what cannot be continued gets status 400."""

from __future__ import annotations

import http.client
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import needs
import pytest
from serving import Running, serve
from tiny_bundle import TEMPLATE, write_manifest

from mbq_runtime import Engine, UsageError
from mbq_runtime.server import app
from mbq_runtime.server.tools import FORMATS

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
USER = {"role": "user", "content": "hello"}
TOOL = {"type": "function", "function": {"name": "f"}}
SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}


def said(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def ask(running: Running, path: str, **body: Any) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
    connection.request("POST", path, json.dumps({"temperature": 0, **body}), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    found = answer.status, answer.read().decode()
    connection.close()
    return found


def asked(running: Running, path: str, **body: Any) -> Any:
    status, text = ask(running, path, **body)
    assert status == 200, text
    return json.loads(text)


def streamed(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def test_the_prompt_is_the_template_before_it_and_the_text(engine: Engine) -> None:
    before = [{"role": "system", "content": "Be brief."}, USER]
    for text in ("The sea", "wör", "A b \n", "", "<|im_start|>"):
        prompt = engine.chat_prompt([*before, said(text)])
        assert prompt == engine.chat_prompt(before) + text
        assert engine.prompt_tokens([*before, said(text)]) == engine.encode(prompt)
    call = {"id": "0", "type": "function", "function": {"name": "f", "arguments": {}}}
    begins_anew = ([*before, said("A", tool_calls=[call])], [*before, said("A"), USER], before)
    for messages in begins_anew:
        assert engine.chat_prompt(messages).endswith("<|im_end|>\n<|im_start|>assistant\n")
    whole = engine.chat_prompt([USER, said("A")], {"add_generation_prompt": False})
    assert whole.endswith("A<|im_end|>\n"), "the conversation as it is"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([said("A")], "nothing comes before it"),
        ([USER, said("A", reasoning_content="hm")], "reasoning"),
        ([USER, said("A", thinking="hm")], "reasoning"),
    ],
)
def test_what_cannot_be_continued(engine: Engine, messages: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        engine.prompt_tokens(messages)


def test_a_chat_completion(running: Running) -> None:
    for content in ("AB", [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]):
        body: dict[str, Any] = {"messages": [USER, said(content)], "max_tokens": 4}
        found = asked(running, CHAT, **body)
        assert found["choices"][0]["message"] == said("CDEF")
        _, text = ask(running, CHAT, **body, stream=True)
        deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in streamed(text)]
        assert "".join(deltas) == "CDEF"
    plain = asked(running, CHAT, messages=[USER], max_tokens=1)["usage"]["prompt_tokens"]
    assert found["usage"]["prompt_tokens"] == plain + 2
    several = asked(running, CHAT, **body, n=2)
    assert [choice["message"]["content"] for choice in several["choices"]] == ["CDEF"] * 2
    spaced = asked(running, CHAT, messages=[USER, said("AB ")], max_tokens=1)
    assert spaced["usage"]["prompt_tokens"] == plain + 3, "the text as it is"


def test_a_message(running: Running) -> None:
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 4, "messages": [USER, said("AB")]}
    found = asked(running, MESSAGES, **body)
    assert [block["text"] for block in found["content"]] == ["CDEF"]
    _, text = ask(running, MESSAGES, **body, stream=True)
    assert "".join(one["delta"]["text"] for one in streamed(text) if one["type"] == "content_block_delta") == "CDEF"
    del body["max_tokens"]
    counted = asked(running, f"{MESSAGES}/count_tokens", model="tiny", messages=body["messages"])
    assert counted["input_tokens"] == found["usage"]["input_tokens"] + found["usage"]["cache_read_input_tokens"]
    for content in ("AB ", "AB\n", [{"type": "text", "text": "AB\t"}]):
        status, text = ask(running, MESSAGES, model="tiny", max_tokens=4, messages=[USER, said(content)])
        assert (status, "end with whitespace" in text) == (400, True), text
    between = [USER, said("AB "), USER]
    assert ask(running, MESSAGES, model="tiny", max_tokens=4, messages=between)[0] == 200


def test_a_response(running: Running) -> None:
    found = asked(running, RESPONSES, input=[USER, said("AB")], max_output_tokens=4)
    assert found["output"][0]["content"][0]["text"] == "CDEF"


def test_tokenize_counts_what_a_reply_reads(running: Running) -> None:
    messages = [USER, said("AB")]
    count = asked(running, "/tokenize", messages=messages)["count"]
    assert count == asked(running, CHAT, messages=messages, max_tokens=1)["usage"]["prompt_tokens"]


def test_fields_of_other_servers_agree_or_are_refused(running: Running) -> None:
    ends_with = {True: [USER, said("AB")], False: [USER]}
    for continues, messages in ends_with.items():
        for value in (True, False, None):
            for field, meant in (("continue_final_message", value), ("add_generation_prompt", not value)):
                body: dict[str, Any] = {"messages": messages, field: value}
                for path, more in ((CHAT, {"max_tokens": 2}), ("/tokenize", {})):
                    status, text = ask(running, path, **body, **more)
                    agrees = value is None or meant is continues
                    assert (status, field in text) == ((200, False) if agrees else (400, True)), (body, text)
        both = {"continue_final_message": continues, "add_generation_prompt": not continues}
        assert ask(running, CHAT, messages=messages, max_tokens=2, **both)[0] == 200
    for mark in ("prefix", "partial"):
        found = asked(running, CHAT, messages=[USER, said("AB", **{mark: True})], max_tokens=4)
        assert found["choices"][0]["message"]["content"] == "CDEF"
        for messages in ([USER, said("AB", **{mark: True}), USER], [{**USER, mark: True}]):
            status, text = ask(running, CHAT, messages=messages)
            assert (status, "last message" in text) == (400, True), text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": SCHEMA}, "response_format"),
        ({"structured_outputs": {"regex": "A+"}}, "structured_outputs"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, "add_generation_prompt"),
    ],
)
def test_a_constraint_would_begin_in_the_middle(running: Running, fields: dict[str, Any], words: str) -> None:
    status, text = ask(running, CHAT, messages=[USER, said("{")], **fields)
    found = json.loads(text)["error"]
    assert (status, words in found["message"], "assistant" in found["message"]) == (400, True, True), found
    assert ask(running, CHAT, messages=[USER, said("AB")], response_format={"type": "text"}, max_tokens=2)[0] == 200


def test_tools_that_may_be_called(with_tools: Running) -> None:
    body: dict[str, Any] = {"tools": [TOOL], "messages": [USER, said("AB")], "max_tokens": 4}
    found = asked(with_tools, CHAT, **body)
    assert found["choices"][0]["message"]["content"] == "CDEF"
    status, text = ask(with_tools, CHAT, **{**body, "messages": [USER, said('<tool_call>{"name":')]})
    assert (status, "begun call" in text) == (400, True), text
    assert ask(with_tools, CHAT, **body, tool_choice="none")[0] == 200


def test_the_reply_of_a_family_without_marks_is_no_call(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls of the family llama are the whole reply.  A continuation is never that."""
    needs.module("llguidance")
    folder = Path(shutil.copytree(bundle, tmp_path / "llama"))
    (folder / "chat_template.jinja").write_text("{% if tools %}{% endif %}" + TEMPLATE)
    write_manifest(folder)
    monkeypatch.setattr(app, "find_format", lambda template: FORMATS["llama"])
    asks_for_a_call = {"tools": [TOOL], "logit_bias": {str(ord("{") + 3): 100}, "max_tokens": 4}
    with serve(Engine.load(folder, threads=1)) as running:
        found = asked(running, CHAT, messages=[USER, said("AB")], **asks_for_a_call)
    assert found["choices"][0]["message"]["content"] == "{{{{"


def test_reasoning_that_the_template_begins(bundle: Path, tmp_path: Path) -> None:
    """The text is the answer: it goes behind reasoning that the template ends, and not into one that it begins."""
    folder = Path(shutil.copytree(bundle, tmp_path / "thinking"))
    begins = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% else %}<think>{% endif %}"
    opening = "{{ '<|im_start|>assistant\n' }}"
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace(opening, opening + begins))
    write_manifest(folder)
    with serve(Engine.load(folder, threads=1)) as running:
        status, text = ask(running, CHAT, messages=[USER, said("AB")])
        assert (status, "begins with reasoning" in text) == (400, True), text
        found = asked(running, CHAT, messages=[USER, said("AB")], enable_thinking=False, max_tokens=4)
        assert found["choices"][0]["message"] == said("CDEF")


def test_the_text_opens_reasoning(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "thinking"))
    (folder / "chat_template.jinja").write_text(TEMPLATE + "{# </think> #}")
    write_manifest(folder)
    engine = Engine.load(folder, threads=1)
    for text in ("<think>", "<think>hm"):
        with pytest.raises(UsageError, match="reasoning"):
            engine.prompt_tokens([USER, said(text)])
    assert engine.chat_prompt([USER, said("<think>hm</think>AB")]).endswith("</think>AB")
