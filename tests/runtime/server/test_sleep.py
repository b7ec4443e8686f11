"""A server that nobody asks frees the memory of its model, and answers the next request."""

from __future__ import annotations

import json
import urllib.request
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import Running, serve, wait_for
from tiny_bundle import CIRCLE

from mbq_runtime import Engine, UsageError


@pytest.fixture
def sleeper(bundle: Path) -> Iterator[tuple[Engine, Running]]:
    engine = Engine.load(bundle, threads=1)
    with serve(engine, sleep_s=0.3, cache_bytes=10**7) as running:
        yield engine, running


def metrics(running: Running) -> str:
    with urllib.request.urlopen(f"{running.url}/metrics") as reply:
        return str(reply.read().decode())


def test_an_idle_server_sleeps_and_wakes(sleeper: tuple[Engine, Running]) -> None:
    engine, running = sleeper
    model = weakref.ref(engine._backend)
    ask: dict[str, Any] = {"model": "tiny", "prompt": "xA", "temperature": 0, "max_tokens": 6}
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        assert client.completions.create(**ask, n=2).choices[1].text == CIRCLE[1:]
        assert "mbq_asleep 0.0" in metrics(running)
        wait_for(lambda: engine.asleep)
        wait_for(lambda: model() is None, "freeing the model")
        text = metrics(running)
        assert "mbq_asleep 1.0" in text
        assert "mbq_contexts_kept 0.0" in text
        body = json.dumps({"content": "AB"}).encode()
        with urllib.request.urlopen(f"{running.url}/tokenize", body) as reply:
            assert json.load(reply)["tokens"] == [68, 69]
        assert client.models.list().data[0].id == "tiny"
        assert engine.asleep  # a text is encoded without the model
        assert client.completions.create(**ask).choices[0].text == CIRCLE[1:]
        assert "mbq_asleep 0.0" in metrics(running)


def test_a_server_whose_model_cannot_sleep_goes_on(
    sleeper: tuple[Engine, Running], caplog: pytest.LogCaptureFixture
) -> None:
    """Code beside the server reads a reply of the same engine."""
    engine, running = sleeper
    reply = engine.generate("A", chat=False, max_tokens=5)
    next(reply)
    with caplog.at_level("ERROR"):
        wait_for(lambda: "the models stay in memory" in caplog.text)
    reply.close()
    wait_for(lambda: engine.asleep)
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        assert client.completions.create(model="tiny", prompt="xA", temperature=0, max_tokens=6).choices[0].text


def test_a_sleeping_engine_takes_settings(bundle: Path) -> None:
    engine = Engine.load(bundle, threads=2, avg_bits=5.0)
    session = engine.session()
    engine.generate("A", chat=False, max_tokens=2, session=session).text()
    engine.sleep()
    engine.threads, engine.avg_bits = 1, 6.0
    assert engine.asleep
    with pytest.raises(UsageError, match="it is another engine's; make one with this engine's session"):
        engine.generate("A", session=session)
    reply = engine.generate("A", chat=False, max_tokens=2)
    assert reply.text() == "BC"
    assert reply.stats.avg_bits_used == pytest.approx(6.07, abs=0.01)
    again = engine.generate("A", chat=False, max_tokens=5)
    next(again)
    with pytest.raises(UsageError, match="already generating"):
        engine.sleep()
    again.close()
