"""The real model behind the server, asked by the official client; and measured by ``mbq bench``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

pytestmark = pytest.mark.slow

MBQ = [sys.executable, "-m", "mbq_runtime.cli"]
SEA: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Tell me about the sea."}]


@pytest.fixture(scope="module")
def client(smollm2_host_bundle: Path) -> Iterator[openai.OpenAI]:
    command = [*MBQ, "serve", str(smollm2_host_bundle), "--port", "0", "--bits", "8"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    found = re.search(r"http://\S+?:\d+", server.stdout.readline())
    assert found is not None
    yield openai.OpenAI(base_url=f"{found[0]}/v1", api_key="none", max_retries=0)
    server.terminate()
    server.wait()


def test_a_streamed_chat_is_the_whole_one(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    whole = client.chat.completions.create(model=model, messages=SEA, temperature=0, max_tokens=40)
    text = whole.choices[0].message.content
    assert text is not None
    assert "sea" in text.lower()
    stream = client.chat.completions.create(model=model, messages=SEA, temperature=0, max_tokens=40, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == text
    assert len(pieces) > 10  # it came as it was made
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 40
    assert whole.usage.model_dump()["avg_bits"] == pytest.approx(8.0, abs=1e-3)


def test_a_stop_text_ends_a_completion(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    full = client.completions.create(model=model, prompt="One, two, three, four,", temperature=0, max_tokens=24)
    words = full.choices[0].text.split()
    stop = words[3]
    cut = client.completions.create(
        model=model, prompt="One, two, three, four,", temperature=0, max_tokens=24, stop=[stop]
    )
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].text == full.choices[0].text.partition(stop)[0]


def test_a_seed_repeats_a_reply_and_bits_are_the_request_s(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id

    def draw(seed: int, bits: float) -> tuple[str, float]:
        found = client.chat.completions.create(
            model=model, messages=SEA, temperature=1, seed=seed, max_tokens=24, extra_body={"avg_bits": bits}
        )
        assert found.usage is not None
        return found.choices[0].message.content or "", found.usage.model_dump()["avg_bits"]

    assert draw(7, 8) == draw(7, 8)
    assert draw(7, 8)[0] != draw(8, 8)[0]
    with pytest.raises(openai.BadRequestError, match="this server offers 8 to 8 bits"):
        draw(7, 4)  # the server was started with --bits 8


def test_a_client_that_leaves_frees_the_engine(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    stream = client.completions.create(model=model, prompt="Once upon a time", max_tokens=5000, stream=True)
    next(iter(stream))
    stream.close()
    start_s = time.monotonic()
    client.completions.create(model=model, prompt="Once upon a time", max_tokens=2)
    left_s = time.monotonic() - start_s
    timed = client.completions.create(model=model, prompt="Once upon a time", max_tokens=40)
    assert timed.usage is not None
    assert left_s < 1000 / timed.usage.model_dump()["tokens_per_s"]  # far less than 5000 tokens take


def test_bench(smollm2_host_bundle: Path) -> None:
    command = [
        *MBQ,
        "bench",
        str(smollm2_host_bundle),
        "-p",
        "64",
        "-n",
        "16",
        "-r",
        "3",
        "--bits",
        "3,8",
        "-o",
        "json",
    ]
    rows = json.loads(subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout)
    assert [(row["test"], row["bits"]) for row in rows] == [("pp64", 3.0), ("pp64", 8.0), ("tg16", 3.0), ("tg16", 8.0)]
    for row in rows:
        assert row["avg_bits_used"] == pytest.approx(row["bits"], abs=1e-3)
        assert len(row["samples_ns"]) == 3
