"""Tools: how each family writes calls, and calls through the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import needs
import openai
import pytest
from serving import Running
from tiny_bundle import EOS

from mbq_runtime import Engine
from mbq_runtime.engine import Grammar
from mbq_runtime.server.tool_format import Call, named
from mbq_runtime.server.tools import FORMATS, CallReader, call_grammar, find_format

TEMPLATES = Path(__file__).parents[2] / "data" / "templates"

# By family: a reply with two calls (one, where the family has one), and the text around them.
REPLIES = {
    "hermes": (
        'I look.\n<tool_call>\n{"name": "tide", "arguments": {"place": "Ouessant"}}\n</tool_call>\n<tool_call>\n'
        '{"name": "now", "arguments": {}}\n</tool_call>',
        "I look.",
    ),
    "smollm": (
        '<tool_call>\n{"name": "tide", "arguments": {"place": "Ouessant"}}\n</tool_call>\n<tool_call>\n'
        '{"name": "now", "arguments": {}}\n</tool_call>',
        "",
    ),
    "mistral": (
        '[TOOL_CALLS] [{"name": "tide", "arguments": {"place": "Ouessant"}}, {"name": "now", "arguments": {}}]', "",
    ),
    "granite": (
        '<|tool_call|>[{"name": "tide", "arguments": {"place": "Ouessant"}}, {"name": "now", "arguments": {}}]', "",
    ),
    "ministral": ('[TOOL_CALLS]tide[ARGS]{"place": "Ouessant"}[TOOL_CALLS]now[ARGS]{}', ""),
    "qwen3.5": (
        "I look.\n<tool_call>\n<function=tide>\n<parameter=place>\nOuessant\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "I look.",
    ),
    "llama": ('\n{"name": "tide", "parameters": {"place": "Ouessant"}}', ""),
    "lfm": ('<|tool_call_start|>[tide(place="Ouessant"), now()]<|tool_call_end|>Done.', "Done."),
}  # fmt: skip
CALLS = [Call("tide", '{"place": "Ouessant"}'), Call("now", "{}")]


def read(family: str, pieces: list[str]) -> tuple[str, list[Call]]:
    reader = CallReader(FORMATS[family])
    found = [one for piece in pieces for one in reader.feed(piece)] + list(reader.finish())
    return "".join(one for one in found if isinstance(one, str)), [one for one in found if isinstance(one, Call)]


@pytest.mark.parametrize("family", FORMATS)
def test_calls_of_each_family_however_the_text_is_cut(family: str) -> None:
    text, around = REPLIES[family]
    wanted = CALLS[:1] if family == "llama" else CALLS
    for size in (1, 2, 3, 7, len(text)):
        said, calls = read(family, [text[at : at + size] for at in range(0, len(text), size)])
        assert (said.strip(), calls) == (around, wanted), size


@pytest.mark.parametrize("family", FORMATS)
@pytest.mark.parametrize(
    "text",
    [
        "The tide turns at six.",
        "a < b, [TOOL] and <tool",
        " {no call}",
        "",
        "  \n",
        "{}x",
        "<tool_call>[1]</tool_call>",
    ],
)
def test_other_text_stays_as_it_is(family: str, text: str) -> None:
    for pieces in (list(text), [text]):
        assert read(family, pieces) == (text, [])


def test_what_is_no_call_after_all_comes_out_as_text() -> None:
    for text in ("<tool_call>{never ends", '<tool_call>{"nome": "f"}</tool_call>', "<tool_call>[[[[</tool_call> b"):
        assert read("hermes", list(text)) == (text, [])
    assert read("lfm", ["<|tool_call_start|>[f(1)]<|tool_call_end|>"])[1] == []
    assert read("lfm", ["<|tool_call_start|>[f(a=open('x'))]<|tool_call_end|>"])[1] == []
    for values in ("a=b'x'", "a={1, 2}", "a=1e999", "a={(1, 2): 3}", "a='\\ud800'", "a=..."):
        text = f"<|tool_call_start|>[f({values})]<|tool_call_end|>"
        assert read("lfm", [text]) == (text, [])
    for call in (
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "\\ud800"}',
        '{"name": "f", "arguments": "\\udc00"}',
    ):
        text = f"<tool_call>{call}</tool_call>"
        assert read("hermes", [text]) == (text, [])
    assert read("lfm", ["<|tool_call_start|>" + "(" * 10**5 + "<|tool_call_end|>"])[1] == []


@pytest.mark.parametrize(
    ("file", "family"),
    [
        ("qwen2.5", "hermes"), ("qwen3", "hermes"), ("hermes", "hermes"), ("falcon3", "hermes"),
        ("mistral-v0.3", "mistral"), ("granite3", "granite"), ("llama3", "llama"), ("lfm2", "lfm"),
        ("smollm3", "smollm"), ("gemma3", None), ("chatml", None),
    ],
)  # fmt: skip
def test_the_family_is_seen_in_the_template(file: str, family: str | None) -> None:
    found = find_format((TEMPLATES / f"{file}.jinja").read_text())
    assert found == (None if family is None else FORMATS[family])


def test_families_that_share_a_mark_are_told_apart() -> None:
    assert find_format("{{ '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}") == FORMATS["ministral"]
    assert find_format("{{ '[TOOL_CALLS]' + name + '[CALL_ID]' + id + '[ARGS]' + arguments }}") is None
    assert find_format("<tool_call>\n<function={{ name }}>") == FORMATS["qwen3.5"]


def test_values_in_tags_have_the_types_of_the_schema() -> None:
    types = {"a": {"type": "string"}, "b": {"type": "integer"}, "c": {"enum": ["1", "2"]}, "d": {"type": "boolean"}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": types}}}
    values = {"a": "20", "b": "20", "c": "1", "d": "True", "e": '{"x": [1]}', "f": "two\nlines", "g": "2 of 3"}
    tags = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    reader = CallReader(FORMATS["qwen3.5"]._replace(tools=named([tool])))
    (call,) = reader.feed(f"<tool_call>\n<function=f>\n{tags}</function>\n</tool_call>")
    assert isinstance(call, Call)
    assert json.loads(call.arguments) == {
        "a": "20", "b": 20, "c": "1", "d": True, "e": {"x": [1]}, "f": "two\nlines", "g": "2 of 3",
    }  # fmt: skip


TIDE: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "tide",
        "description": "When the tide turns.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"enum": ["AB", "CD"]}, "high": {"type": "boolean"}},
            "required": ["place", "high"],
            "additionalProperties": False,
        },
    },
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}


@pytest.fixture(scope="module")
def client(with_tools: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{with_tools.url}/v1", api_key="none", max_retries=0, timeout=30) as found:
        yield found


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "A"}], "tools": [TIDE, NOW], "temperature": 0}
    return client.chat.completions.create(**{**body, **fields})


def check_arguments(text: str) -> None:
    arguments = json.loads(text)
    assert set(arguments) == {"place", "high"}
    assert arguments["place"] in ("AB", "CD")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "tide"}}])
def test_a_call_that_is_demanded(client: openai.OpenAI, choice: Any) -> None:
    found = ask(client, tool_choice=choice, tools=[TIDE], parallel_tool_calls=False).choices[0]
    assert found.finish_reason == "tool_calls"
    assert found.message.content is None
    (call,) = found.message.tool_calls
    assert (call.type, call.function.name) == ("function", "tide")
    check_arguments(call.function.arguments)


def test_a_call_in_a_stream(client: openai.OpenAI) -> None:
    chunks = list(ask(client, tool_choice="required", tools=[TIDE], parallel_tool_calls=False, stream=True))
    (made,) = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert (made.index, made.function.name) == (0, "tide")
    assert made.id
    check_arguments(made.function.arguments)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""


TWO = 'So: <tool_call>{"name": "a"}</tool_call>\n<tool_call>{"name": "b"}</tool_call>'


@pytest.mark.parametrize("stream", [False, True])
def test_calls_that_a_model_makes_of_itself(client: openai.OpenAI, stream: bool) -> None:
    """The tiny model is held to a text with two calls; the server does not know that they must come."""
    made = ask(client, stream=stream, extra_body={"structured_outputs": {"choice": [TWO]}})
    if stream:
        chunks = list(made)
        calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        assert [call.index for call in calls] == [0, 1]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        (choice,) = made.choices
        calls, text, reason = choice.message.tool_calls, choice.message.content, choice.finish_reason
    assert [(call.function.name, call.function.arguments) for call in calls] == [("a", "{}"), ("b", "{}")]
    assert text.strip() == "So:"
    assert reason == "tool_calls"
    assert len({call.id for call in calls}) == 2


def test_text_without_calls_goes_through(client: openai.OpenAI) -> None:
    for choice in ("auto", "none"):
        found = ask(client, tool_choice=choice, max_tokens=5).choices[0]
        assert found.message.content == "BCDEF"
        assert (found.message.tool_calls, found.finish_reason) == (None, "length")


PLACES: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "sail",
        "parameters": {
            "type": "object", "properties": {"to": {"$ref": "#/$defs/place"}}, "required": ["to"],
            "additionalProperties": False, "$defs": {"place": {"enum": ["AB", "CD"]}},
        },
    },
}  # fmt: skip


def ends(engine: Engine, grammar: Grammar, text: str) -> bool:
    """Whether a reply of this text is one of the grammar's."""
    matcher = engine._grammars.matcher(grammar)
    for token in engine.encode(text):
        if not matcher.allowed()[token]:
            return False
        matcher.accept(token)
    return bool(matcher.allowed()[EOS])


@pytest.mark.parametrize("family", [name for name, row in FORMATS.items() if row.rule and row.opens])
@pytest.mark.parametrize("special", [False, True])
def test_calls_that_nobody_demands_follow_the_schemas(engine: Engine, family: str, special: bool) -> None:
    needs.module("llguidance")
    row = FORMATS[family]
    opens = "<|im_start|>" if special else row.opens  # a special token of the tiny model
    row = row._replace(opens=opens, tools=named([TIDE, PLACES, NOW]))
    grammar = call_grammar(row, demanded=False, several=True, special_id=engine.special_id)
    assert grammar is not None

    def call(name: str, arguments: str) -> str:
        body = f'{{"name": "{name}", "{row.arguments}": {arguments}}}'
        if row.inner:
            body = f"{name}{row.inner}{arguments}"
        if family == "qwen3.5":
            values = {
                key: value if isinstance(value, str) else json.dumps(value)
                for key, value in json.loads(arguments).items()
            }
            tags = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
            body = f"<function={name}>\n{tags}</function>"
        before, after = row.around
        return opens + before + (f"[{body}]" if row.listed else body) + after + row.closes

    right = call("tide", '{"place": "AB", "high": true}')
    assert ends(engine, grammar, "The tide < turns [at] six. {}")
    for text in (right, f"So: {right}", call("sail", '{"to": "CD"}'), call("now", "{}")):
        assert ends(engine, grammar, text), text
    # A family without a closing mark has its calls at the end.
    assert ends(engine, grammar, f"{right}\n{right} So.") is bool(row.closes)
    for name, arguments in (("tides", "{}"), ("tide", '{"place": "EF", "high": true}'), ("sail", '{"to": "EF"}')):
        assert not ends(engine, grammar, call(name, arguments)), name


def test_what_a_grammar_does_not_know_is_left_out_unless_a_call_is_demanded(client: openai.OpenAI) -> None:
    needs.module("llguidance")
    odd = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    tool = {"type": "function", "function": {"name": "odd", "parameters": odd}}
    assert ask(client, tools=[tool], max_tokens=3).choices[0].message.content == "BCD"
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, tools=[tool], tool_choice="required")
    assert (caught.value.param, caught.value.code) == ("tools", "invalid_grammar")


def test_tools_and_their_answers_reach_the_template(client: openai.OpenAI) -> None:
    def tokens(**fields: Any) -> int:
        return int(ask(client, max_tokens=1, **fields).usage.prompt_tokens)

    talk: list[dict[str, Any]] = [{"role": "user", "content": "A"}]
    assert tokens() == 2 + len("uA")
    assert tokens(tool_choice="none") == len("uA")
    call = {"id": "123456789", "type": "function", "function": {"name": "tide", "arguments": '{"place": "AB"}'}}
    talk += [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "123456789", "content": "six"},
    ]
    assert tokens(messages=talk) == 2 + len("uA" + "a" + "<tool_call>AB" + "tsix")


def test_special_tokens_show_where_they_are_asked_for(engine: Engine) -> None:
    needs.module("llguidance")
    grammar = Grammar("lark", 'start: "B" <[1]> "C"')
    ask_for: dict[str, Any] = {"chat": False, "grammar": grammar, "max_tokens": 5}
    assert engine.generate("A", **ask_for).text() == "BC"
    assert engine.generate("A", shown=["<|im_start|>", "none"], **ask_for).text() == "B<|im_start|>C"
    assert engine.special_id("<|im_start|>") == 1
    assert engine.special_id("A") is None
