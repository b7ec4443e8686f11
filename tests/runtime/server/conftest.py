from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import needs
import openai
import pytest
from serving import SLOW_S, Running, serve
from tiny_bundle import write_manifest

from mbq_runtime import Engine

_TOOLS_TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool.function.name[0] }}{% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.role[0] + m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.arguments.place or '' }}{% endfor %}{% endfor %}"
)


@pytest.fixture(autouse=True)
def _loaded_before() -> None:
    """A server that starts looks at each object of the process.  What the tests have loaded by now is left out."""
    gc.freeze()


@pytest.fixture(scope="session")
def with_tools(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of the tiny bundle with a template of the family hermes, which answers for every model."""
    needs.module("llguidance")
    folder = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("tools") / "bundle"))
    (folder / "chat_template.jinja").write_text(_TOOLS_TEMPLATE)
    write_manifest(folder)
    with serve(Engine.load(folder, threads=1), any_model=True) as found:
        yield found


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
