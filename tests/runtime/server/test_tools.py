"""Tools: how each family writes calls, and calls through the official client."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import needs
import openai
import pytest
from serving import Running, serve
from tiny_bundle import EOS, write_bundle, write_manifest

from mbq_runtime import Engine
from mbq_runtime.bundle import manifest
from mbq_runtime.engine import Grammar
from mbq_runtime.engine.template import ChatTemplate
from mbq_runtime.errors import GrammarError
from mbq_runtime.server.braced_calls import reader
from mbq_runtime.server.errors import ApiError
from mbq_runtime.server.requests import ChatBody, parse
from mbq_runtime.server.tool_format import Call, ToolFormat, named
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
    "gemma4": (
        'I look.<|tool_call>call:tide{place:<|"|>Ouessant<|"|>}<tool_call|><|tool_call>call:now{}<tool_call|>',
        "I look.",
    ),
    "functiongemma": (
        "<start_function_call>call:tide{place:<escape>Ouessant<escape>}<end_function_call>"
        "<start_function_call>call:now{}<end_function_call>",
        "",
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
        ("smollm3", "smollm"), ("gemma3", None), ("gemma4", "gemma4"),
        ("functiongemma", "functiongemma"), ("chatml", None),
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


@pytest.mark.parametrize("family", FORMATS)
@pytest.mark.parametrize("special", [False, True])
def test_calls_that_nobody_demands_follow_the_schemas(engine: Engine, family: str, special: bool) -> None:
    needs.module("llguidance")
    row = FORMATS[family]
    if special:  # special tokens of the tiny model
        row = row._replace(opens=row.opens and "<|im_start|>", quote=row.quote and "<|endoftext|>", ends="<|im_end|>")
    row = row._replace(tools=named([TIDE, PLACES, NOW]))
    grammar = call_grammar(row, demanded=False, several=True, exact=not row.opens, special_id=engine.special_id)
    assert grammar is not None

    def call(name: str, **arguments: Any) -> str:
        before, after = row.around
        return row.opens + before + written(family, row, name, arguments) + after + row.closes

    right = call("tide", high=True, place="AB") if row.quote else call("tide", place="AB", high=True)
    assert ends(engine, grammar, "The tide < turns [at] six. {}")
    for text in (right, call("sail", to="CD"), call("now")):
        assert ends(engine, grammar, text), text
    assert ends(engine, grammar, f"So: {right}")  # which is text, where calls have no mark
    # A family without a closing mark has its calls at the end.
    assert ends(engine, grammar, f"{right}\n{right} So.") is bool(row.closes)
    for text in (call("tides"), call("tide", high=True, place="EF"), call("sail", to="EF"), call("tide", high=True)):
        assert not ends(engine, grammar, text), text


def written(family: str, row: ToolFormat, name: str, arguments: dict[str, Any]) -> str:
    """A call as a family writes it."""
    if row.quote:
        values = {
            key: row.quote + value + row.quote if isinstance(value, str) else json.dumps(value)
            for key, value in arguments.items()
        }
        return f"call:{name}{{{','.join(f'{key}:{value}' for key, value in values.items())}}}"
    if family == "lfm":
        values = {key: repr(value).replace("'", '"') for key, value in arguments.items()}
        return f"[{name}({', '.join(f'{key}={value}' for key, value in values.items())})]"
    if family == "qwen3.5":
        values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
        tags = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
        return f"<function={name}>\n{tags}</function>"
    if row.inner:
        return f"{name}{row.inner}{json.dumps(arguments)}"
    body = json.dumps({"name": name, row.arguments: arguments})
    return f"[{body}]" if row.listed else body


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("family", ["gemma4", "functiongemma", "lfm"])
def test_values_that_are_not_written_as_json(engine: Engine, family: str, special: bool) -> None:
    """Each kind of schema: what the grammar takes is what the reader gives, and what breaks the schema is refused."""
    needs.module("llguidance")
    quote = FORMATS[family].quote
    row = FORMATS[family]._replace(opens="<|im_start|>")
    if special and quote:
        row = row._replace(quote="<|endoftext|>", read=reader("<|endoftext|>"))
    node = {
        "type": "object", "properties": {"v": {"type": "integer", "maximum": 9}, "next": {"$ref": "#/$defs/node"}},
        "required": ["v"], "additionalProperties": False,
    }  # fmt: skip
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 1, "maxItems": 2},
            "b": {"anyOf": [{"type": "null"}, {"type": "number"}]},
            "c": {"type": ["boolean", "string"], "pattern": "^[x-z]+$"},
            "d": {"const": {"k": [1, True]}},
            "e": {"$ref": "#/$defs/node"},
            "f": {},
            "g": {"enum": ["two words", 3]},
        },
        "additionalProperties": False,
        "$defs": {"node": node},
    }
    tool: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": schema}}
    row = row._replace(tools=named([tool]))
    grammar = call_grammar(row, demanded=True, several=False, exact=True, special_id=engine.special_id)
    assert grammar is not None

    def text(value: Any, python: bool = not quote) -> str:
        if isinstance(value, str):
            return json.dumps(value) if python else row.quote + value + row.quote
        if isinstance(value, list):
            return f"[{(', ' if python else ',').join(map(text, value))}]"
        if isinstance(value, dict):
            pairs = (
                f"{json.dumps(key)}: {text(part)}" if python else f"{key}:{text(part)}" for key, part in value.items()
            )
            return f"{{{(', ' if python else ',').join(pairs)}}}"
        return repr(value) if python else json.dumps(value)

    def body(arguments: dict[str, Any]) -> str:
        if quote:
            return "call:f" + text(arguments)
        return f"[f({', '.join(f'{key}={text(part)}' for key, part in arguments.items())})]"

    for right in (
        {},
        {"a": ["x", "ab{"]},
        {"b": None, "d": {"k": [1, True]}},
        {"a": [""], "b": -2.5, "c": "xyz", "e": {"next": {"v": 3}, "v": 4} if quote else {"v": 4, "next": {"v": 3}}},
        {"c": True, "f": {"any": ["thing", 1, None, {}]}, "g": "two words"},
        {"f": [], "g": 3},
    ):
        assert ends(engine, grammar, row.opens + body(right) + row.closes), right
        (call,) = row.read(body(right), row.tools)
        assert json.loads(call.arguments) == right
    wrongs: list[dict[str, Any]] = [
        {"a": []}, {"a": ["abcd"]}, {"a": ["x"] * 3}, {"b": "x"}, {"c": "abc"}, {"c": None}, {"d": {"k": [1]}},
        {"e": {}}, {"e": {"v": 10}}, {"g": "two"}, {"h": 1},
    ]  # fmt: skip
    for wrong in wrongs:
        assert not ends(engine, grammar, row.opens + body(wrong) + row.closes), wrong
    bad = {**tool["function"], "parameters": {"type": "object", "properties": {"a": {"not": {}}}}}
    row = row._replace(tools=named([{"type": "function", "function": bad}]))
    with pytest.raises(GrammarError, match="json_schema: at not: not known for the calls of this model"):
        call_grammar(row, demanded=True, several=False, exact=True, special_id=engine.special_id)
    assert call_grammar(row, demanded=True, several=False, exact=False, special_id=engine.special_id)


def test_calls_in_braces_that_are_none() -> None:
    for call in (
        "call:f", "f{}", "call:f{a}", "call:f{a:}", "call:f{a:1", "call:f{a:1}}", "call:f{a:<escape>b}", "call:f{a:b}",
        "call:f{a:[1}", "call:f{a:NaN}", "call:f{" + "a:{" * 10**5, 'call:f{a:"\\ud800"}',
    ):  # fmt: skip
        text = f"<start_function_call>{call}<end_function_call>"
        assert read("functiongemma", [text]) == (text, [])
    spaced = '<start_function_call> call:f { a : "b", <escape>c<escape>: [1, {d:None}] } <end_function_call>'
    assert read("functiongemma", [spaced]) == ("", [Call("f", '{"a": "b", "c": [1, {"d": null}]}')])


@pytest.mark.parametrize("family", ["gemma4", "functiongemma"])
def test_a_template_of_gemma_says_what_its_calls_are(family: str, tmp_path: Path) -> None:
    """Tools, calls and answers as the template writes them; its calls are those that the reader knows."""
    (tmp_path / "chat_template.jinja").write_text((TEMPLATES / f"{family}.jinja").read_text())
    row = FORMATS[family]
    call = {"id": "1", "type": "function", "function": {"name": "tide", "arguments": {"place": "AB", "high": True}}}
    talk: list[dict[str, Any]] = [
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "tide", "tool_call_id": "1", "content": "six"},
    ]
    described = {**TIDE["function"], "description": "When?"}
    text = ChatTemplate(tmp_path).render(talk, {"tools": [{"type": "function", "function": described}]})
    assert f"declaration:tide{{description:{row.quote}When?{row.quote}" in text
    assert f"response:tide{{value:{row.quote}six{row.quote}}}" in text
    _, _, after = text.partition(row.opens)
    found, _, _ = after.partition(row.closes)
    (made,) = row.read(found, {})
    assert (made.name, json.loads(made.arguments)) == ("tide", {"high": True, "place": "AB"})
    assert text.index(row.ends) > text.index(row.closes)  # a reply ends before the answer


def test_a_reply_of_gemma_ends_where_an_answer_would_begin(tmp_path: Path) -> None:
    """In a stream, through the server, where the texts are no special tokens."""
    needs.module("llguidance")
    folder = write_bundle(tmp_path / "bundle", context=400)
    shutil.copy(TEMPLATES / "gemma4.jinja", folder / "chat_template.jinja")
    write_manifest(folder, manifest.read(folder))
    call = "<|tool_call>call:now{}<tool_call|>"
    said = {"structured_outputs": {"choice": [f"So.{call}<|tool_response>response"]}}
    with (
        serve(Engine.load(folder, threads=1)) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=30) as client,
    ):
        short = {"type": "function", "function": {"name": "now", "description": ""}}
        chunks = list(
            ask(client, tools=[short], stream=True, extra_body=said, messages=[{"role": "user", "content": ""}])
        )
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [(call.function.name, call.function.arguments) for call in calls] == [("now", "{}")]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "So."
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_what_a_grammar_does_not_know_is_left_out_unless_a_call_is_demanded(client: openai.OpenAI) -> None:
    needs.module("llguidance")
    odd = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    tool: dict[str, Any] = {"type": "function", "function": {"name": "odd", "parameters": odd}}
    assert ask(client, tools=[tool], max_tokens=3).choices[0].message.content == "BCD"
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, tools=[tool], tool_choice="required")
    assert (caught.value.param, caught.value.code) == ("tools", "invalid_grammar")
    tool["function"]["strict"] = True
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, tools=[tool])
    assert (caught.value.param, caught.value.code) == ("tools", "invalid_grammar")
    assert ask(client, tools=[{**TIDE, "function": {**TIDE["function"], "strict": True}}], max_tokens=3).choices
    with pytest.raises(openai.BadRequestError, match="a reply has one grammar; leave strict or response_format out"):
        ask(client, tools=[tool], response_format={"type": "json_object"})


ODD = ("x", "2", None, -1, 1.5, True, [], [1], {}, {"a": 1})


@pytest.mark.parametrize("family", FORMATS)
@pytest.mark.parametrize(
    ("field", "around"),
    [
        ("minItems", {"type": "array"}),
        ("maxItems", {"type": "array"}),
        ("items", {"type": "array"}),
        ("minLength", {"type": "string"}),
        ("maxLength", {"type": "string"}),
        ("pattern", {"type": "string"}),
        ("required", {"type": "object", "properties": {"b": {}}}),
        ("properties", {"type": "object"}),
        ("additionalProperties", {"type": "object"}),
        ("type", {}),
        ("enum", {}),
        ("anyOf", {}),
        ("$ref", {}),
    ],
)
def test_a_schema_with_a_value_of_another_kind(family: str, field: str, around: dict[str, Any]) -> None:
    """A client's mistake is a GrammarError, or left out; any other error would be one of the server."""
    for value in ODD:
        odd = {**around, field: value}
        for parameters in (odd, {"type": "object", "properties": {"a": odd}}):
            tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
            row = FORMATS[family]._replace(tools=named([tool]))
            for exact in (False, True):
                with suppress(GrammarError):
                    call_grammar(row, demanded=exact, several=True, exact=exact, special_id=lambda text: None)


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


PIECES = ("A", " ", "\n", "<", "<b>", "[", "{", "x", "</tool_call>")


@pytest.mark.parametrize("family", FORMATS)
def test_any_division_gives_the_same_text_and_calls(family: str) -> None:
    """Spaces and what looks like the start of a call come in any order, before, between and after calls."""
    tool_format = FORMATS[family]
    opens, closes = tool_format.opens or "{", tool_format.closes or "}"
    call = f'{opens}{{"name": "f", "arguments": {{}}}}{closes}'
    rng = random.Random(family)
    for _ in range(300):
        parts = [*PIECES, opens, opens[:-1], closes, call, call, " ", "\n"]
        text = "".join(rng.choice(parts) for _ in range(rng.randint(1, 9)))
        whole = _joined(tool_format, [text])
        assert _joined(tool_format, [*text]) == whole, text
        at = rng.randint(0, len(text))
        assert _joined(tool_format, [text[:at], text[at:]]) == whole, text


def _joined(tool_format: ToolFormat, texts: list[str]) -> list[Any]:
    """Text without its borders, and calls."""
    reader, found = CallReader(tool_format), list[Any]()
    for piece in [piece for text in texts for piece in reader.feed(text)] + [*reader.finish()]:
        if isinstance(piece, str) and found and isinstance(found[-1], str):
            found[-1] += piece
        else:
            found.append(piece)
    return found


@pytest.mark.parametrize("arguments", ["null", "5", "true", "[1]", '"hello"', '"[1]"', '"{"', '""', "NaN"])
@pytest.mark.parametrize("family", ["hermes", "llama"])
def test_arguments_that_are_no_object_are_text(family: str, arguments: str) -> None:
    tool_format = FORMATS[family]
    body = f'{{"name": "f", "{tool_format.arguments}": {arguments}}}'
    text = f"{tool_format.opens}{body}{tool_format.closes}"
    assert _joined(tool_format, [text]) == [text]
    given = body.replace(arguments, '{"a": 1}')
    assert [call.arguments for call in _joined(tool_format, [text.replace(body, given)])] == ['{"a": 1}']


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("kind", [None, "text", "json_object"])
def test_a_demanded_call_and_a_format(choice: Any, kind: str | None) -> None:
    """The format "text" is the default of the API."""
    tool = {"type": "function", "function": {"name": "weather"}}
    body = {"messages": [{"role": "user", "content": "A"}], "tools": [tool], "tool_choice": choice}
    body["response_format"] = kind and {"type": kind}
    if kind == "json_object":
        with pytest.raises(ApiError, match="leave response_format out"):
            parse(ChatBody, json.dumps(body).encode())
    else:
        assert parse(ChatBody, json.dumps(body).encode()).must_call
