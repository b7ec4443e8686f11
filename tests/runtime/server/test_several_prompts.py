"""/v1/completions takes several prompts in one request, and scores a text without a reply."""

from __future__ import annotations

import time
from typing import Any

import openai
import pytest
from serving import Running
from tiny_bundle import ids

from mbq_runtime import Engine

ASK: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 3}


@pytest.mark.parametrize("prompts", [["xA", "yCD", "zB"], [ids("xA"), ids("yCD"), ids("zB")], ["xA"], [ids("xA")]])
@pytest.mark.parametrize("n", [1, 2])
def test_choices_are_in_the_order_of_the_prompts(client: openai.OpenAI, prompts: list[Any], n: int) -> None:
    single = [client.completions.create(**ASK, prompt=one) for one in prompts]
    found = client.completions.create(**ASK, prompt=prompts, n=n)
    texts = [one.choices[0].text for one in single for _ in range(n)]
    assert texts[0] == "BCD"
    assert [choice.text for choice in found.choices] == texts
    assert [choice.index for choice in found.choices] == list(range(len(prompts) * n))
    assert found.usage is not None
    assert found.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in single if one.usage)
    assert found.usage.completion_tokens == 3 * n * len(prompts)
    streamed, ended = [""] * len(texts), set()
    for chunk in client.completions.create(**ASK, prompt=prompts, n=n, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
            if choice.finish_reason:
                ended.add(choice.index)
    assert (streamed, ended) == (texts, set(range(len(texts))))


def test_seeds_are_those_of_single_requests(client: openai.OpenAI) -> None:
    ask = {**ASK, "temperature": 2, "seed": 5, "n": 2, "extra_body": {"avg_bits": 3}}
    together = client.completions.create(**ask, prompt=["xA", "hello"])
    alone = [
        choice.text for prompt in ("xA", "hello") for choice in client.completions.create(**ask, prompt=prompt).choices
    ]
    assert [choice.text for choice in together.choices] == alone


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (["A", ""], "prompt 1: the prompt is empty"),
        (["A", "B" * 500], "prompt 1: the prompt is 500 tokens long"),
        ([[5], [264]], "prompt 1: token id 264"),
        (["A", [5]], "one list of token ids"),
        ([[5], []], "one list of token ids"),
        (["A", 5], "one list of token ids"),
        ([[[5]]], "one list of token ids"),
        (["A"] * 257, "257 prompts"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_prompt_refuses_all(client: openai.OpenAI, prompt: Any, words: str, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(**ASK, prompt=prompt, stream=stream)
    assert words in error.value.message


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_is_scored_without_a_reply(client: openai.OpenAI, loaded: Engine, stream: bool) -> None:
    ask: dict[str, Any] = {"model": "tiny", "max_tokens": 0, "logprobs": 1, "echo": True, "extra_body": {"avg_bits": 4}}
    texts = ["xABC", "yCDé"]
    if stream:
        choices = [
            choice for chunk in client.completions.create(prompt=texts, stream=True, **ask) for choice in chunk.choices
        ]
        found = [choice for choice in choices if choice.logprobs]
        ends = [choice.finish_reason for choice in choices if choice.finish_reason]
    else:
        whole = client.completions.create(prompt=texts, **ask)
        found, ends = whole.choices, [choice.finish_reason for choice in whole.choices]
        assert whole.usage is not None
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (9, 0)
    assert ends == ["length"] * 2
    for text, choice in zip(texts, found, strict=True):
        assert choice.text == text
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        expected = loaded.likelihoods(ids(text), 4.0, 1)
        assert choice.logprobs.token_logprobs[0] is None
        assert choice.logprobs.token_logprobs[1:] == pytest.approx([one.logprob for one in expected[1:]])
    plain = client.completions.create(model="tiny", prompt="xA", max_tokens=0, echo=True)
    assert (plain.choices[0].text, plain.choices[0].logprobs) == ("xA", None)


def test_nothing_is_asked(client: openai.OpenAI) -> None:
    for more in ({}, {"logprobs": 1}, {"echo": False}):
        with pytest.raises(openai.BadRequestError, match="max_tokens 0: needs echo"):
            client.completions.create(model="tiny", prompt="xA", max_tokens=0, **more)  # type: ignore[call-overload]


def test_a_client_that_leaves_ends_all_prompts(slow_engine: Engine, running: Running, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).completions.create(**{**ASK, "max_tokens": 90}, prompt=["xA"] * 100)
    deadline_s = time.monotonic() + 10
    while running.server.worker.running and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert not running.server.worker.running
