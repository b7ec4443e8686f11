"""The server reads of each prompt only what its conversations do not have yet."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from openai.types import CompletionUsage
from serving import Running, serve, wait_for
from tiny_bundle import CIRCLE, CONTEXT, ids

from mbq_runtime import Engine
from mbq_runtime.server.kept_contexts import KeptContexts

CONTEXT_BYTES = CONTEXT * 2 * 2 * 16 * 4  # keys and values of two heads of 16, in float32


@pytest.fixture
def caching(engine: Engine) -> Iterator[Running]:
    """A server that keeps three contexts."""
    with serve(engine, cache_bytes=3 * CONTEXT_BYTES) as found:
        yield found


@pytest.fixture
def client(caching: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{caching.url}/v1", api_key="none", max_retries=0, timeout=30) as found:
        yield found


def complete(client: openai.OpenAI, prompt: str, tokens: int = 4) -> tuple[str, CompletionUsage]:
    found = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=tokens)
    assert found.usage is not None
    return found.choices[0].text, found.usage


def cached(usage: CompletionUsage) -> int:
    assert usage.prompt_tokens_details is not None
    return usage.prompt_tokens_details.cached_tokens or 0


def test_conversations_in_turn_read_what_is_new(client: openai.OpenAI, caching: Running) -> None:
    talks = ["uA", "vwB", "xyzC"]
    for turn in range(4):
        for at, talk in enumerate(talks):
            text, usage = complete(client, talk)
            assert text == (CIRCLE * 3)[CIRCLE.index(talk[-1]) + 1 :][:4]
            assert cached(usage) == (len(talk) - 2 if turn else 0)  # the reply's last token, and the user's new one
            talks[at] += text + CIRCLE[at]
    text = caching.server.metrics.text().decode()
    assert "mbq_contexts_kept 3.0" in text
    worker = caching.server.worker
    assert f"mbq_cached_prompt_tokens_total {float(worker.cached_tokens)}" in text
    assert worker.cached_tokens == sum(
        (2 + 5 * turn - 2) + (3 + 5 * turn - 2) + (4 + 5 * turn - 2) for turn in (1, 2, 3)
    )
    assert f"mbq_cache_bytes {float(worker.contexts.kept_bytes)}" in text


def test_a_stream_counts_what_was_cached(client: openai.OpenAI) -> None:
    complete(client, "xyzA")
    stream = client.completions.create(
        model="tiny", prompt="xyzAB", temperature=0, max_tokens=3, stream=True, stream_options={"include_usage": True}
    )
    *_, last = stream
    assert last.usage is not None
    assert cached(last.usage) == 4


def test_the_context_used_longest_ago_goes_first(client: openai.OpenAI, caching: Running) -> None:
    starts = ["a" * 40, "b" * 40, "c" * 40]
    for start in starts:
        complete(client, start, 1)
    complete(client, starts[0] + "A", 1)  # now b is the oldest
    complete(client, "d" * 40, 1)
    wait_for(lambda: caching.server.worker.contexts.kept_bytes == 3 * CONTEXT_BYTES)
    assert [cached(complete(client, start + "AB", 1)[1]) > 0 for start in (starts[2], starts[0])] == [True, True]
    assert cached(complete(client, starts[1] + "AB", 1)[1]) == 0


def test_one_context_is_kept_even_if_it_is_larger_than_the_cache(engine: Engine) -> None:
    with serve(engine, cache_bytes=CONTEXT_BYTES - 1) as small:
        with openai.OpenAI(base_url=f"{small.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
            complete(client, "x" * 40)
            assert cached(complete(client, "x" * 40)[1]) == 39
            complete(client, "y" * 40)
        contexts = small.server.worker.contexts
        wait_for(lambda: contexts.kept_bytes == CONTEXT_BYTES)
        assert len(contexts) == 1


def test_nothing_is_kept_without_memory_for_it(engine: Engine) -> None:
    with serve(engine, cache_bytes=0) as none, openai.OpenAI(base_url=f"{none.url}/v1", api_key="none") as client:
        complete(client, "x" * 40)
        assert cached(complete(client, "x" * 40)[1]) == 0


def read(engine: Engine, contexts: KeptContexts, text: str) -> int:
    """How many tokens of a prompt are read."""
    prompt = ids(text)
    reply = engine.generate(prompt, max_tokens=1, session=contexts.take(engine, prompt))
    reply.text()
    contexts.trim()
    return len(prompt) - reply.stats.cached_tokens


def test_a_common_beginning_serves_questions_that_never_come_back(engine: Engine) -> None:
    contexts = KeptContexts(10**6)
    rules = "r" * 40
    assert read(engine, contexts, rules + "question") == 48
    assert [read(engine, contexts, rules + f"{at}uestion") for at in range(4)] == [8] * 4
    assert len(contexts) == 1


def test_two_conversations_with_a_common_beginning_get_a_context_each(engine: Engine) -> None:
    contexts = KeptContexts(10**6)
    talks = ["r" * 12 + who for who in "ab"]
    counts = []
    for _ in range(12):
        for at in range(2):
            counts.append(read(engine, contexts, talks[at]))
            talks[at] += "xyz"
    assert len(contexts) == 2
    assert counts[-8:] == [3] * 8  # a token that nobody has read ends each prompt
    assert sum(counts) <= 2 * sum(len(talk) for talk in talks)
