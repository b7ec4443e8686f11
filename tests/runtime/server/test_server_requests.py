"""Any request gets a status below 500 in the error format of OpenAI, and the next request is served."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import needs
import pytest
from hostile_templates import HOSTILE
from serving import Running, serve
from tiny_bundle import write_manifest

from mbq_runtime import Engine
from mbq_runtime.engine.generation import Likelihood
from mbq_runtime.server import app, completions, replies
from mbq_runtime.server.worker import Part

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SAY_A = [{"role": "user", "content": "A"}]


@pytest.fixture(scope="module")
def running(loaded: Engine) -> Iterator[Running]:
    """One server for all requests; it must survive them."""
    with serve(loaded) as found:
        yield found


def ask(running: Running, path: str, body: bytes, method: str = "POST", **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
    connection.request(method, path, body, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def still_answers(running: Running) -> bool:
    status, found = ask(running, COMPLETIONS, b'{"prompt": "xA", "temperature": 0, "max_tokens": 3}')
    return status == 200 and found["choices"][0]["text"] == "BCD"


def chat(**fields: Any) -> bytes:
    return json.dumps({"messages": SAY_A, **fields}).encode()


def completion(**fields: Any) -> bytes:
    return json.dumps({"prompt": "A", **fields}).encode()


def message(content: Any, role: Any = "user") -> bytes:
    return json.dumps({"messages": [{"role": role, "content": content}]}).encode()


REFUSED: dict[str, tuple[str, bytes, str | None, str]] = {
    # name: path, body, the field named, words of the message
    "nothing": (CHAT, b"", None, "EOF"),
    "no JSON": (CHAT, b"messages=hello", None, "Invalid JSON"),
    "cut off": (CHAT, chat()[:-4], None, "EOF"),
    "a list": (CHAT, b"[]", None, "object"),
    "null": (CHAT, b"null", None, "object"),
    "invalid UTF-8": (CHAT, b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', None, "unicode"),
    "overlong UTF-8": (CHAT, b'{"messages": [{"role": "user", "content": "\xc0\xaf"}]}', None, "unicode"),
    "half a surrogate": (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', None, "escape"),
    "UTF-16": (CHAT, chat().decode().encode("utf-16"), None, "Invalid JSON"),
    "deep nesting": (CHAT, b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, "recursion"),
    "deep nesting, ignored field": (CHAT, b'{"x": ' + b'{"x":' * 100_000, None, "recursion"),
    "a number of 5000 digits": (CHAT, b'{"seed": ' + b"9" * 5000 + b"}", None, "number"),
    "no messages": (CHAT, b"{}", "messages", "required"),
    "messages of the wrong type": (CHAT, b'{"messages": "A"}', "messages", "valid array"),
    "empty messages": (CHAT, b'{"messages": []}', "messages", "at least 1"),
    "a message that is text": (CHAT, b'{"messages": ["A"]}', "messages.0", "object"),
    "no role": (CHAT, b'{"messages": [{"content": "A"}]}', "messages.0.role", "required"),
    "unknown role": (CHAT, message("A", "boss"), "messages.0.role", "'user'"),
    "content is a number": (CHAT, message(5), "messages.0.content", "valid string"),
    "a picture": (CHAT, message([{"type": "image_url", "image_url": {}}]), "messages.0.content", "parts of type text"),
    "parts that are not objects": (CHAT, message([1]), "messages.0.content", "parts of type text"),
    "too long": (CHAT, message("A" * 500), None, "tokens long"),
    "no prompt": (COMPLETIONS, b"{}", "prompt", "required"),
    "empty prompt": (COMPLETIONS, completion(prompt=""), None, "the prompt is empty"),
    "a text and a list": (COMPLETIONS, completion(prompt=["A", [5]]), "prompt", "one text"),
    "prompt is a number": (COMPLETIONS, completion(prompt=7), "prompt", "one text"),
    "prompt of booleans": (COMPLETIONS, completion(prompt=[True]), "prompt", "one list of token ids"),
    "no tokens": (COMPLETIONS, completion(prompt=[]), "prompt", "one list of token ids"),
    "negative token": (COMPLETIONS, completion(prompt=[-1]), "prompt", "one list of token ids"),
    "unknown token": (COMPLETIONS, completion(prompt=[264]), None, "token id 264: the model's ids go from 0 to 263"),
    "token beyond 64 bits": (COMPLETIONS, completion(prompt=[10**30]), "prompt", "one list of token ids"),
    "max_tokens 0": (CHAT, chat(max_tokens=0), "max_tokens", "greater than or equal to 1"),
    "max_tokens is text": (CHAT, chat(max_tokens="9"), "max_tokens", "valid integer"),
    "max_tokens is a fraction": (CHAT, chat(max_tokens=1.5), "max_tokens", "integer"),
    "temperature below 0": (CHAT, chat(temperature=-0.1), "temperature", "greater than or equal to 0"),
    "temperature above 2": (CHAT, chat(temperature=2.1), "temperature", "less than or equal to 2"),
    "temperature not a number": (CHAT, b'{"messages": [], "temperature": NaN}', "temperature", "finite"),
    "temperature infinite": (CHAT, b'{"messages": [], "temperature": 1e999}', "temperature", "finite"),
    "top_k below -1": (CHAT, chat(top_k=-2), "top_k", "greater than or equal to 0"),
    "seed is text": (CHAT, chat(seed="x"), "seed", "valid integer"),
    "stop is a number": (CHAT, chat(stop=3), "stop", "valid array"),
    "stop holds a number": (CHAT, chat(stop=["a", 3]), "stop.1", "valid string"),
    "empty stop": (CHAT, chat(stop=""), "stop.0", "at least 1"),
    "long stop": (CHAT, chat(stop="a" * 257), "stop.0", "at most 256"),
    "many stops": (CHAT, chat(stop=["a"] * 17), "stop", "at most 16"),
    "stream is text": (CHAT, chat(stream="yes"), "stream", "valid boolean"),
    "avg_bits too low": (CHAT, chat(avg_bits=2), "avg_bits", "3 to 8"),
    "avg_bits not a number": (CHAT, b'{"messages": [], "avg_bits": NaN}', "avg_bits", "finite"),
    "min_bits too high": (CHAT, chat(min_bits=8.5), "min_bits", "3 to 8"),
    "min_bits above max_bits": (CHAT, chat(min_bits=6, max_bits=5), "min_bits", "above max_bits"),
    "avg_bits and min_bits": (CHAT, chat(avg_bits=6, min_bits=5), "avg_bits", "leave out"),
    "model is a number": (CHAT, chat(model=1), "model", "valid string"),
    "unknown model": (CHAT, chat(model="x" * 1000), "model", "this server has 'tiny'"),
    "no replies": (CHAT, chat(n=0), "n", "greater than or equal to 1"),
    "too many replies": (CHAT, chat(n=17), "n", "less than or equal to 16"),
    "the best of two": (COMPLETIONS, completion(best_of=2), "best_of", "not supported"),
    "a tool without a function": (CHAT, chat(tools=[{"type": "function"}]), "tools.0.function", "required"),
    "a tool of another type": (
        CHAT, chat(tools=[{"type": "web", "function": {"name": "f"}}]), "tools.0.type", "'function'",
    ),
    "tools of a template without them": (
        CHAT, chat(tools=[{"type": "function", "function": {"name": "f"}}]), "tools", "not known; known are gemma4",
    ),
    "a call without tools": (CHAT, chat(tool_choice="required"), None, "tools is empty"),
    "a call of another tool": (
        CHAT, chat(tools=[{"type": "function", "function": {"name": "f"}}], tool_choice={
            "type": "function", "function": {"name": "g"}}), None, "'g': no such tool; tools has f",
    ),
    "template variables in a list": (CHAT, chat(chat_template_kwargs=[1]), "chat_template_kwargs", "an object"),
    "unknown template variable": (CHAT, chat(chat_template_kwargs={"think": True}), None, "no variable 'think'"),
    "effort without a use": (CHAT, chat(reasoning_effort="low"), None, "no variable 'reasoning_effort'"),
    "logprobs that are a number": (CHAT, chat(logprobs=3), "logprobs", "valid boolean"),
    "top_logprobs alone": (CHAT, chat(top_logprobs=3), "top_logprobs", "logprobs"),
    "many top_logprobs": (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs", "less than or equal to 20"),
    "logprobs of a completion": (COMPLETIONS, completion(logprobs=True), "logprobs", "valid integer"),
    "bias of a word": (CHAT, chat(logit_bias={"sea": 1}), "logit_bias.sea.[key]", "pattern"),
    "bias of an unknown token": (CHAT, chat(logit_bias={"264": 1}), None, "token id 264: the model's ids go from"),
    "much bias": (CHAT, chat(logit_bias={"5": 101}), "logit_bias.5", "less than or equal to 100"),
    "an unknown format": (CHAT, chat(response_format={"type": "xml"}), "response_format.type", "'json_object'"),
    "a format without its schema": (
        CHAT, chat(response_format={"type": "json_schema"}), "response_format", "needs the field json_schema",
    ),
    "two grammars": (
        CHAT, chat(structured_outputs={"regex": "a", "choice": ["b"]}), "structured_outputs", "one of json, regex",
    ),
    "no choices": (CHAT, chat(structured_outputs={"choice": []}), "structured_outputs.choice", "at least 1"),
    "penalty": (CHAT, chat(presence_penalty=2.5), "presence_penalty", "less than or equal to 2"),
    "frequency": (CHAT, chat(frequency_penalty=-2.5), "frequency_penalty", "greater than or equal to -2"),
    "repetition": (CHAT, chat(repetition_penalty=0), "repetition_penalty", "greater than 0"),
    "min_p": (CHAT, chat(min_p=1.5), "min_p", "less than or equal to 1"),
    "null of a user": (CHAT, message(None), "messages.0.content", "valid string"),
    "a call without a function": (
        CHAT, json.dumps({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}).encode(),
        "messages.0.tool_calls.0.function", "required",
    ),
    "a function call": (
        CHAT, json.dumps({"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}).encode(),
        "messages.0", "out of date",
    ),
    **{f"{field} of a message": (
        CHAT, json.dumps({"messages": [{"role": "user", "content": "A", field: True}]}).encode(),
        "messages.0", "role assistant is continued",
    ) for field in ("prefix", "partial")},
    "max_tokens -2": (CHAT, chat(max_tokens=-2), "max_tokens", "greater than or equal to 1"),
    **{f"{field} under another name": (CHAT, chat(**{field: value}), field, "not supported") for field, value in (
        ("repeat_penalty", 1.1), ("typical_p", 0.9), ("mirostat", 2),
        ("json_schema", {"type": "object"}), ("grammar", "root ::= 'a'"), ("guided_json", {"type": "object"}),
        ("guided_regex", "a"), ("ignore_eos", True), ("min_tokens", 5), ("n_predict", 5),
        ("max_new_tokens", 5), ("stop_token_ids", [1]), ("do_sample", False), ("function_call", {"name": "f"}),
        ("t_max_predict_ms", 5), ("min_length", 9), ("suppress_tokens", [1]), ("forced_decoder", "x"), ("best_of", 2),
        ("skip_special_tokens", False), ("include_reasoning", False), ("extra_body", {"min_p": 0.1}),
        ("dry_multiplier", 0.8), ("chat_template", "{{ 1 }}"), ("documents", [{"text": "a"}]), ("verbosity", "low"),
    )},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(running: Running, name: str) -> None:
    path, body, param, words = REFUSED[name]
    status, found = ask(running, path, body)
    assert status == (404 if name == "unknown model" else 400), found
    error = found["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert words in error["message"]
    assert len(error["message"]) < 300
    assert still_answers(running)


def test_a_bad_schema_says_what_is_wrong(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    needs.module("llguidance")
    monkeypatch.setattr(replies, "_PROMPT_S", 20.0)  # a slow machine must not begin the stream before the refusal
    wanted = {"type": "object", "properties": {"a": {"type": "strin"}}}
    for stream in (False, True):
        body = chat(
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": wanted}}, stream=stream
        )
        status, found = ask(running, CHAT, body)
        assert (status, found["error"]["code"]) == (400, "invalid_grammar")
        assert found["error"]["param"] == "response_format"
        assert "at properties.a.type: Invalid type: strin" in found["error"]["message"]
    for field, body in (
        ("structured_outputs", chat(structured_outputs={"json": wanted})),
        ("structured_outputs", completion(structured_outputs={"regex": "("})),
    ):
        _, found = ask(running, CHAT if b"messages" in body else COMPLETIONS, body)
        assert (found["error"]["param"], found["error"]["code"]) == (field, "invalid_grammar")
    assert still_answers(running)


def test_neutral_and_unknown_fields_are_let_through(running: Running) -> None:
    body = chat(
        n=1, tools=[], logprobs=False, presence_penalty=0, frequency_penalty=0.0, response_format={"type": "text"},
        user="somebody", metadata={"a": 1}, stop=None, max_tokens=None, temperature=None, stream=None, store=True,
        prompt_cache_key="a", cache_prompt=True, repeat_penalty=1.0, typical_p=1, n_predict=-1, do_sample=True,
        mirostat=0, xtc_probability=0.0, xtc_threshold=0.1, dry_base=1.75, samplers=[], grammar="", anything=None,
        something=False,
    )  # fmt: skip
    status, found = ask(running, CHAT, body)
    assert (status, found["object"]) == (200, "chat.completion")


def test_values_that_other_servers_take(running: Running) -> None:
    _, free = ask(running, CHAT, chat(temperature=0))
    for field in ("max_tokens", "max_completion_tokens"):
        _, found = ask(running, CHAT, chat(temperature=0, **{field: -1}))
        assert found["choices"] == free["choices"]
    _, found = ask(running, COMPLETIONS, completion(prompt="xA", temperature=0, max_tokens=-1))
    assert found["usage"]["completion_tokens"] > 16
    for _ in range(3):
        _, found = ask(running, COMPLETIONS, completion(prompt="xA", top_p=0, max_tokens=3))
        assert found["choices"][0]["text"] == "BCD"
    texts = set()
    for fields in ({"top_k": -1}, {"top_k": 0}):
        _, found = ask(running, COMPLETIONS, completion(prompt="xA", temperature=2, seed=3, avg_bits=3, **fields))
        texts.add(found["choices"][0]["text"])
    assert len(texts) == 1
    for _ in range(4):  # a seed of -1 is a new one each time
        _, found = ask(running, COMPLETIONS, completion(prompt="xA", temperature=2, seed=-1, avg_bits=3))
        texts.add(found["choices"][0]["text"])
    assert len(texts) == 5
    turns = [*SAY_A, {"role": "assistant", "content": None}, *SAY_A]
    counts = set()
    for turn in (turns, [{**one, "content": one["content"] or ""} for one in turns]):
        status, found = ask(running, CHAT, json.dumps({"messages": turn, "max_tokens": 1}).encode())
        assert status == 200, found
        counts.add(found["usage"]["prompt_tokens"])
    assert len(counts) == 1


def test_a_prompt_longer_than_the_context_has_the_code_of_openai(running: Running) -> None:
    for path, body in ((CHAT, message("A" * 500)), (COMPLETIONS, completion(prompt="A" * 500))):
        status, found = ask(running, path, body)
        assert (status, found["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("path", ["/v1//models", "/v1/models/", "//v1/models//", "/v1/models//tiny"])
def test_slashes_are_merged(running: Running, path: str) -> None:
    assert ask(running, path, b"", "GET")[0] == 200


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/rerank", "/api/tags", "/models", "/v1"])
def test_a_path_that_is_not_served_lists_what_is(running: Running, path: str) -> None:
    status, found = ask(running, path, b"{}")
    assert (status, found["error"]["code"]) == (404, "not_found")
    for served in (path, CHAT, COMPLETIONS, "/v1/models"):
        assert served in found["error"]["message"]


def with_template(folder: Path, template: str) -> Engine:
    (folder / "chat_template.jinja").write_text(template)
    write_manifest(folder)
    return Engine.load(folder, threads=1)


def test_variables_reach_the_template(bundle_copy: Path) -> None:
    template = "{{ messages[0].content * (repeats or 1) ~ reasoning_effort }}"
    with serve(with_template(bundle_copy, template)) as running:
        tokens = []
        for fields in ({}, {"reasoning_effort": "high"}, {"chat_template_kwargs": {"repeats": 5}}):
            status, found = ask(running, CHAT, chat(max_tokens=1, **fields))
            assert status == 200, found
            tokens.append(found["usage"]["prompt_tokens"])
        assert tokens == [1, 5, 5]


@pytest.mark.heavy
def test_a_hostile_template(bundle_copy: Path) -> None:
    with serve(with_template(bundle_copy, HOSTILE["nested ranges"])) as running:
        status, found = ask(running, CHAT, chat())
        assert (status, found["error"]["code"]) == (400, "invalid_prompt")
        assert "the chat template takes too long" in found["error"]["message"]
        assert still_answers(running)


def test_a_huge_body_is_refused_before_it_is_read(running: Running) -> None:
    limit = app._MIN_BODY_LIMIT
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (limit + 1))
        assert sock.recv(1000).startswith(b"HTTP/1.1 413 ")
    status, found = ask(running, COMPLETIONS, b'{"prompt": "' + b"x" * limit + b'"}')
    assert (status, found["error"]["code"]) == (413, "body_too_large")
    assert still_answers(running)


def test_a_huge_body_in_chunks_is_refused_when_it_grows_too_large(running: Running) -> None:
    def chunks() -> Any:
        for _ in range(20):
            yield b"x" * (1 << 16)

    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
    connection.request("POST", CHAT, chunks(), encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
    assert connection.getresponse().status == 413
    connection.close()
    assert still_answers(running)


def test_a_body_that_does_not_come_is_not_waited_for(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_UPLOAD_S", 0.2)
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
        assert sock.recv(1000).startswith(b"HTTP/1.1 408 ")
    assert still_answers(running)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/nothing", 404),
        ("GET", "/v1/models/huge", 404),
        ("GET", CHAT, 405),
        ("POST", "/health", 405),
        ("DELETE", "/v1/models", 405),
    ],
)
def test_wrong_paths_and_methods_are_refused_in_the_same_shape(
    running: Running, method: str, path: str, status: int
) -> None:
    found, body = ask(running, path, b"", method)
    assert found == status
    assert set(body["error"]) == {"message", "type", "param", "code"}


def test_tokens_of_texts_and_conversations(running: Running) -> None:
    for body in ({"content": "AB"}, {"prompt": "AB"}, {"content": "AB", "add_special": True}):
        status, found = ask(running, "/tokenize", json.dumps(body).encode())
        assert (status, found["tokens"], found["count"], found["max_model_len"]) == (200, [68, 69], 2, 96)
    status, found = ask(running, "/tokenize", b'{"messages": [{"role": "user", "content": "hello"}]}')
    assert (status, found["count"]) == (200, 24)
    status, found = ask(running, "/detokenize", b'{"tokens": [68, 69, 2, 198, 185]}')
    assert (status, found["content"]) == (200, "AB\N{LATIN SMALL LETTER O WITH DIAERESIS}")
    for path, body, words in (
        ("/tokenize", b"{}", "needed one of content, prompt, messages"),
        ("/tokenize", b'{"content": "a", "prompt": "b"}', "needed one of"),
        ("/detokenize", b'{"tokens": [999]}', "token id 999"),
        ("/detokenize", b'{"tokens": ["a"]}', "tokens.0"),
        ("/v1/responses", b"[]", "needed a JSON object"),
        ("/v1/messages", b'{"messages": [{"role": "user", "content": "A"}]}', "max_tokens: field required"),
    ):
        status, found = ask(running, path, body)
        assert status == 400, path
        assert words in found["error"]["message"]
        assert found["type"] == "error"


WRONG = (
    None,
    True,
    7,
    "x",
    [],
    [7],
    ["x"],
    [[]],
    {},
    {"type": 7},
    [{}],
    [{"type": "x"}],
    {"x": []},
    [{"role": "user"}],
)
FIELDS = {
    "/v1/responses": (
        "input", "instructions", "tools", "tool_choice", "text", "reasoning", "truncation", "max_output_tokens",
        "metadata", "temperature",
    ),
    "/v1/messages": (
        "messages", "system", "tools", "tool_choice", "thinking", "output_config", "output_format", "stop_sequences",
        "max_tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("path", FIELDS)
def test_fields_of_wrong_types_never_break_the_server(running: Running, path: str) -> None:
    whole = {"input": "A"} if path == "/v1/responses" else {"messages": [{"role": "user", "content": "A"}]}
    most = {"max_output_tokens": 1} if path == "/v1/responses" else {"max_tokens": 1}
    refused = 0
    for field in FIELDS[path]:
        for value in WRONG:
            status, found = ask(running, path, json.dumps({**whole, **most, field: value}).encode())
            assert status in (200, 400), (field, value, found)
            refused += status == 400
    for item in WRONG:
        name = "content" if path == "/v1/messages" else "output"
        body = {**whole, **most, next(iter(whole)): [{"role": "user", "type": "function_call_output", name: item}]}
        status, found = ask(running, path, json.dumps(body).encode())
        assert status in (200, 400), (item, found)
    assert refused > 60


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("value", [b"NaN", b"-Infinity", b"1e999", b'"\\ud800"', b'{"\\udfff": 1}'])
@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/messages/count_tokens"])
def test_what_json_cannot_say_is_refused_before_a_reply(
    running: Running, path: str, value: bytes, stream: bool
) -> None:
    fields = b'"input": "hi", "max_output_tokens": 3' if "responses" in path else b'"max_tokens": 3'
    flag = b"true" if stream else b"false"
    status, found = ask(
        running, path, b'{%s, "messages": [], "stream": %s, "metadata": {"a": [%s]}}' % (fields, flag, value)
    )
    assert status == 400
    assert "the request body: " in json.dumps(found)


def test_tokens_beyond_the_context_are_refused(running: Running) -> None:
    status, found = ask(running, "/detokenize", json.dumps({"tokens": [68] * 97}).encode())
    assert (status, found["error"]["param"]) == (400, "tokens")
    assert "97 ids; needed 96 or fewer" in found["error"]["message"]
    assert ask(running, "/detokenize", json.dumps({"tokens": [68] * 96}).encode())[0] == 200


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, 200),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": True}}}, 200),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": False}}}, 400),
        ({"structured_outputs": {"json": True}}, 200),
        ({"structured_outputs": {"json": False}}, 400),
    ],
)
def test_schemas_that_are_true_or_false(running: Running, asked: dict[str, Any], status: int) -> None:
    needs.module("llguidance")
    found = ask(running, CHAT, chat(max_tokens=3, **asked))
    assert found[0] == status, found
    if status == 400:
        assert "no value fits the schema false" in found[1]["error"]["message"]
        assert found[1]["error"]["param"] in asked


@pytest.mark.parametrize("shape", ["whole", "parts"])
@pytest.mark.parametrize(
    ("tokens", "offsets"),
    [
        ("a\u00f6b", [0, 1, 1, 2]),
        ("\u20acx", [0, 0, 0, 1]),
        ("\U0001f600", [0, 0, 0, 0]),
        ("<s>ab", [0, 0, 1]),
        ("<s>\u00f6<s>c", [0, 0, 0, 1, 1]),
    ],
)
def test_offsets_are_places_in_the_text(tokens: str, offsets: list[int], shape: str) -> None:
    """A character may be several tokens, and special tokens are no text."""
    spelled = [
        piece for text in re.split("(<s>)", tokens)
        for piece in ([b"<s>"] if text == "<s>" else [bytes([byte]) for byte in text.encode()])
    ]  # fmt: skip
    known = completions.CompletionShape("m", spelled.__getitem__, has_text=lambda token: spelled[token] != b"<s>")
    likely = [Likelihood(token, -1.0, ()) for token in range(len(spelled))]
    groups = [likely] if shape == "whole" else [[one] for one in likely]
    found = [known.likelihoods(Part(0, "", tuple(group))) for group in groups]
    assert [offset for one in found if one is not None for offset in one["text_offset"]] == offsets
