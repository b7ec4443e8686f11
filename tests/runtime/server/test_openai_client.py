"""The official client against a real server."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any, Literal

import needs
import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletionMessageParam
from serving import SLOW_S, Running, serve
from tiny_bundle import CIRCLE, CONTEXT, REPLY

from mbq_runtime import Engine

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server(loaded: Engine) -> Iterator[Running]:
    """One server for all requests; it must survive them."""
    with serve(loaded) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30) as found:
        yield found


@pytest.fixture(autouse=True)
def running(server: Running, engine: Engine) -> Running:
    """The server, steered as at its start."""
    server.governor.set(avg_bits=engine.avg_bits, power_w=None)
    return server


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert model.id == "tiny"
    assert client.models.retrieve("tiny").model_dump()["max_bits"] == 8.0
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("huge")
    assert caught.value.code == "model_not_found"


def test_chat(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0)
    assert found.object == "chat.completion"
    assert found.choices[0].message.content == REPLY
    assert found.choices[0].finish_reason == "stop"
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (24, 11, 35)


def test_chat_streams(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=HELLO, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    first, *middle, last, figures = stream
    assert first.choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in middle) == REPLY
    assert [chunk.choices[0].finish_reason for chunk in (first, *middle)] == [None] * (1 + len(middle))
    assert last.choices[0].finish_reason == "stop"
    assert figures.choices == []
    assert figures.usage is not None
    assert figures.usage.completion_tokens == 11
    assert {chunk.id for chunk in (first, *middle, last, figures)} == {first.id}
    assert first.object == "chat.completion.chunk"


def test_usage_comes_only_when_asked_for(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, stream=True)
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in stream)


def test_a_conversation_and_content_in_parts(client: openai.OpenAI) -> None:
    talk: list[ChatCompletionMessageParam] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "x"},
    ]
    found = client.chat.completions.create(model="tiny", messages=talk, temperature=0, max_tokens=1)
    assert found.usage is not None
    # Each message is <|im_start|>, role, newline, content, <|im_end|>, newline; then the reply's opening.
    contents = {"system": "Be brief.", "user": "hello", "assistant": "Hi."}
    expected = sum(len(role) + len(text) + 4 for role, text in [*contents.items(), ("user", "x")])
    assert found.usage.prompt_tokens == expected + len("assistant") + 2


def test_completion_streams_up_to_a_stop_text(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="tiny", prompt="xA", temperature=0, stop=["FG", "none"], stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "BCDE"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[0].object == "text_completion"


def test_max_tokens(client: openai.OpenAI) -> None:
    short = client.completions.create(model="tiny", prompt="xA", temperature=0, max_tokens=3)
    assert (short.choices[0].text, short.choices[0].finish_reason) == ("BCD", "length")
    default = client.completions.create(model="tiny", prompt="xA", temperature=0)
    assert default.choices[0].text == (CIRCLE * 3)[1:17]
    chat = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, max_completion_tokens=2)
    assert chat.choices[0].message.content == REPLY[:2]
    all_there_is = client.completions.create(model="tiny", prompt="xA", temperature=0, max_tokens=10**9)
    assert all_there_is.usage is not None
    assert all_there_is.usage.total_tokens == CONTEXT


def test_prompt_as_tokens(client: openai.OpenAI) -> None:
    tokens = [byte + 3 for byte in b"xA"]
    for prompt in (tokens, [tokens], ["xA"]):
        found = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=3)  # type: ignore[arg-type]
        assert found.choices[0].text == "BCD"


def test_seed_repeats_a_varied_reply(client: openai.OpenAI) -> None:
    def draw(seed: int, temperature: float = 2) -> str:
        found = client.completions.create(
            model="tiny", prompt="xA", temperature=temperature, seed=seed, max_tokens=12, extra_body={"avg_bits": 3}
        )
        return found.choices[0].text

    assert draw(1) == draw(1) == draw(1 + 2**31)
    assert len({draw(seed) for seed in range(4)}) == 4
    assert draw(1, temperature=0) == draw(2, temperature=0) == (CIRCLE * 2)[1:13]


def test_top_p_and_top_k_leave_only_the_likeliest(client: openai.OpenAI) -> None:
    for narrow in ({"top_p": 1e-6}, {"extra_body": {"top_k": 1}}):
        found = client.completions.create(model="tiny", prompt="xA", temperature=2, seed=1, max_tokens=12, **narrow)  # type: ignore[call-overload]
        assert found.choices[0].text == (CIRCLE * 2)[1:13]


def test_several_replies(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny", "prompt": "xA", "temperature": 2, "seed": 5, "max_tokens": 12}
    ask["extra_body"] = {"avg_bits": 3}
    found = client.completions.create(n=3, **ask)
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    alone = [client.completions.create(**{**ask, "seed": 5 + i}) for i in range(3)]
    assert [choice.text for choice in found.choices] == [one.choices[0].text for one in alone]
    assert len({choice.text for choice in found.choices}) == 3
    assert found.usage is not None
    counts = [one.usage.completion_tokens for one in alone if one.usage is not None]
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (2, sum(counts))

    texts, reasons = ["", "", ""], {}
    for chunk in client.completions.create(n=3, stream=True, **ask):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in found.choices]
    assert reasons == {choice.index: choice.finish_reason for choice in found.choices}


def test_several_replies_of_a_chat_each_begin_with_their_role(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, n=2, stream=True)
    roles, texts = [], ["", ""]
    for chunk in stream:
        (choice,) = chunk.choices
        roles += [choice.index] if choice.delta.role else []
        texts[choice.index] += choice.delta.content or ""
    assert (roles, texts) == ([0, 1], [REPLY] * 2)


def test_likelihoods_of_a_chat(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    found = client.chat.completions.create(**ask).choices[0]
    assert found.logprobs is not None
    content = found.logprobs.content
    assert content is not None
    assert bytes(byte for one in content for byte in one.bytes or []).decode() == REPLY
    for one in content:
        assert len(one.top_logprobs) == 3
        assert one.top_logprobs[0].logprob == one.logprob <= 0  # the likeliest was taken
        assert [likely.logprob for likely in one.top_logprobs] == sorted(
            (likely.logprob for likely in one.top_logprobs), reverse=True
        )
    streamed = [
        one
        for chunk in client.chat.completions.create(stream=True, **ask)
        if chunk.choices[0].logprobs
        for one in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == content
    without = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, logprobs=True)
    assert without.choices[0].logprobs is not None
    assert without.choices[0].logprobs.content is not None
    assert [one.logprob for one in without.choices[0].logprobs.content] == [one.logprob for one in content]
    assert client.chat.completions.create(model="tiny", messages=HELLO).choices[0].logprobs is None


def test_likelihoods_of_a_completion(client: openai.OpenAI) -> None:
    found = client.completions.create(model="tiny", prompt="xA", temperature=0, max_tokens=4, logprobs=2)
    about = found.choices[0].logprobs
    assert about is not None
    assert about.tokens == ["B", "C", "D", "E"]
    assert about.text_offset == [0, 1, 2, 3]
    assert about.top_logprobs is not None
    assert about.token_logprobs == [likely[token] for likely, token in zip(about.top_logprobs, "BCDE", strict=True)]


class Boat(pydantic.BaseModel):
    """What a client wants to know."""

    kind: Literal["sloop", "ketch"]
    masts: Literal[1, 2, 3]
    crew: list[Literal["Ann", "Bo"]] = pydantic.Field(max_length=2)


def test_a_reply_is_json_of_a_pydantic_model(client: openai.OpenAI) -> None:
    needs.module("llguidance")
    for seed in range(4):
        found = client.chat.completions.parse(
            model="tiny", messages=HELLO, temperature=1.5, seed=seed, response_format=Boat, max_tokens=70
        )
        boat = found.choices[0].message.parsed
        assert boat is not None
        assert found.choices[0].finish_reason == "stop"
        assert boat.kind in ("sloop", "ketch")


def test_json_mode_gives_an_object(client: openai.OpenAI) -> None:
    needs.module("llguidance")
    found = client.chat.completions.create(
        model="tiny", messages=HELLO, temperature=0, max_tokens=5, response_format={"type": "json_object"}
    )
    assert (found.choices[0].message.content or "").startswith("{")


def test_structured_outputs(client: openai.OpenAI) -> None:
    needs.module("llguidance")
    for wanted, pattern in (
        ({"regex": "[A-D]{3}!"}, "[A-D]{3}!"), ({"choice": ["yes", "no"]}, "yes|no"), ({"json": {"const": 5}}, "5"),
        ({"grammar": 'start: "a" "b"'}, "ab"),
    ):  # fmt: skip
        stream = client.completions.create(
            model="tiny", prompt="xA", stream=True, max_tokens=9, extra_body={"structured_outputs": wanted}
        )
        assert re.fullmatch(pattern, "".join(chunk.choices[0].text for chunk in stream))


def test_the_choice_of_tokens_is_the_client_s(client: openai.OpenAI) -> None:
    """The tiny model answers A with B, B with C and so on; each option alone changes that."""
    ask: dict[str, Any] = {"model": "tiny", "prompt": "xA", "temperature": 0, "max_tokens": 12}
    plain = client.completions.create(**ask).choices[0].text
    assert plain == (CIRCLE * 2)[1:13]
    c = str(ord("C") + 3)
    without_c = client.completions.create(logit_bias={c: -100}, **ask).choices[0].text
    assert without_c[0] == "B"
    assert "C" not in without_c
    assert client.completions.create(logit_bias={c: 100}, **ask).choices[0].text == "C" * 12
    long = {**ask, "max_tokens": 90}
    assert client.completions.create(frequency_penalty=2.0, **long).choices[0].text != (CIRCLE * 14)[1:91]
    varied = {**long, "temperature": 2, "seed": 1, "extra_body": {"avg_bits": 3}}
    texts = {client.completions.create(presence_penalty=penalty, **varied).choices[0].text for penalty in (0.0, 2.0)}
    assert len(texts) == 2
    assert client.completions.create(extra_body={"repetition_penalty": 8.0}, **ask).choices[0].text != plain
    narrow = {**ask, "temperature": 2, "seed": 1}
    assert client.completions.create(extra_body={"min_p": 1.0}, **narrow).choices[0].text == plain


@pytest.mark.parametrize(
    ("asked", "governed", "used"),
    [
        ({}, 5.0, 5.0),
        ({"avg_bits": 4}, 5.0, 4.0),
        ({"min_bits": 6.5}, 5.0, 6.5),
        ({"min_bits": 4}, 5.0, 5.0),
        ({"max_bits": 3.5}, 5.0, 3.5),
        ({"min_bits": 4, "max_bits": 6}, 7.0, 6.0),
    ],
)
def test_a_request_bounds_its_bits(
    client: openai.OpenAI, running: Running, asked: dict[str, float], governed: float, used: float
) -> None:
    running.governor.set(avg_bits=governed)
    found = client.completions.create(model="tiny", prompt="xA", temperature=0, extra_body=asked)
    assert found.usage is not None
    # The tiny model reports its budget plus a thousandth of the step's mean token id, 68 to 74 here.
    assert found.usage.model_dump()["avg_bits"] == pytest.approx(used + 0.07, abs=0.01)
    assert running.bounded.avg_bits == governed  # the next request is the governor's again


def test_energy_is_unknown_without_a_sensor(client: openai.OpenAI) -> None:
    found = client.completions.create(model="tiny", prompt="xA", temperature=0)
    assert found.usage is not None
    assert found.usage.model_dump()["energy_j"] is None


def test_energy_is_power_over_the_reply_s_time(slow_engine: Engine, client: openai.OpenAI, running: Running) -> None:
    running.governor.set(power_w=2.0)
    start_s = time.monotonic()
    found = client.completions.create(model="tiny", prompt="xA", temperature=0, max_tokens=10)
    assert found.usage is not None
    assert 2.0 * 9 * SLOW_S <= found.usage.model_dump()["energy_j"] <= 2.0 * (time.monotonic() - start_s)


def test_errors_are_the_client_s_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="model 'huge' is unknown; this server has 'tiny'"):
        client.chat.completions.create(model="huge", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="the prompt is 97 tokens long") as caught:
        client.completions.create(model="tiny", prompt="x" * 97)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="97 tokens long"):
        client.completions.create(model="tiny", prompt="x" * 97, stream=True)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, extra_body={"avg_bits": 9})
    assert caught.value.param == "avg_bits"
    assert "this server offers 3 to 8 bits" in caught.value.message


def test_a_failure_in_mid_stream_reaches_the_client(
    client: openai.OpenAI, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object, spent_s: float) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr("mbq_runtime.control.metered_reply.MeteredReply._count", broken)
    with pytest.raises(openai.APIError, match="the engine failed"):
        list(client.completions.create(model="tiny", prompt="xA", stream=True))
    with pytest.raises(openai.InternalServerError, match="the engine failed"):
        client.completions.create(model="tiny", prompt="xA")
    monkeypatch.undo()
    assert client.completions.create(model="tiny", prompt="xA", temperature=0, max_tokens=1).choices[0].text == "B"


def test_text_travels_as_utf8(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=HELLO, temperature=0)
    assert json.loads(raw.content)["choices"][0]["message"]["content"] == REPLY
    assert "ö".encode() in raw.content


def test_a_prompt_that_is_echoed_has_its_likelihoods(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 2, "logprobs": 1, "echo": True}
    found = client.completions.create(prompt="xABC", **ask).choices[0]
    assert found.text == "xABCDE"
    about = found.logprobs
    assert about is not None
    assert about.tokens == ["x", "A", "B", "C", "D", "E"]
    assert about.text_offset == list(range(6))
    assert about.token_logprobs is not None
    assert about.top_logprobs is not None
    assert (about.token_logprobs[0], about.top_logprobs[0]) == (None, None)
    assert about.token_logprobs[1] < -5  # after x comes y
    assert all(value > -0.1 for value in about.token_logprobs[2:])
    parts = list(client.completions.create(prompt=[byte + 3 for byte in b"xABC"], stream=True, **ask))
    assert "".join(part.choices[0].text for part in parts) == "xABCDE"
    plain = client.completions.create(model="tiny", prompt="xA", temperature=0, max_tokens=2, echo=True)
    assert plain.choices[0].text == "xABC"
