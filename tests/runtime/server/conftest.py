from __future__ import annotations

import time
from collections.abc import Iterator

import openai
import pytest
from serving import SLOW_S, Running, serve

from mbq_runtime import Engine


@pytest.fixture
def running(engine: Engine) -> Iterator[Running]:
    """A server of the tiny bundle with room for 16 waiting requests."""
    with serve(engine) as found:
        yield found


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=30) as found:
        yield found


@pytest.fixture
def slow_engine(engine: Engine) -> Iterator[Engine]:
    """The same engine, but each token takes SLOW_S."""

    def wait(seconds: float, bits: float) -> None:
        time.sleep(SLOW_S)

    engine.add_listener(wait)
    yield engine
    engine.remove_listener(wait)
