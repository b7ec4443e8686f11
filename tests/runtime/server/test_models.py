"""A server of several bundles: a request names one, and those used longest ago leave the memory."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from forked_mbq import Mbq
from serving import Running, serve, wait_for
from tiny_bundle import CIRCLE, CONTEXT, TEMPLATE, facts, write_manifest

from mbq_runtime import Engine, UsageError
from mbq_runtime.control.bounds import BoundedEngine
from mbq_runtime.server.models import Models, named

ASK: dict[str, Any] = {"prompt": "xA", "temperature": 0, "max_tokens": 6}


def copy_of(bundle: Path, folder: Path, name: str) -> Path:
    """The bundle under another name.  Its template puts a letter before each message."""
    shutil.copytree(bundle, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("message['content']", "'x' + message['content']"))
    base = facts()
    write_manifest(folder, replace(base, model=replace(base.model, name=name)))
    return folder


@pytest.fixture(scope="module")
def second_bundle(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of(bundle, tmp_path_factory.mktemp("second") / "folder", "second")


@pytest.fixture
def engines(bundle: Path, second_bundle: Path) -> list[Engine]:
    """The tiny bundle, and the second one, asleep as at the start of ``mbq serve``."""
    found = [Engine.load(path, threads=1) for path in (bundle, second_bundle)]
    found[1].sleep()
    return found


@pytest.fixture
def one_at_a_time(engines: list[Engine]) -> Iterator[Running]:
    """A server with memory for one of the two."""
    most = engines[0].memory_bytes * 3 // 2
    with serve(*engines, most_bytes=most, cache_bytes=10**7) as running:
        yield running


@pytest.fixture
def client(one_at_a_time: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{one_at_a_time.url}/v1", api_key="none", max_retries=0, timeout=30) as found:
        yield found


def metrics(running: Running) -> str:
    with urllib.request.urlopen(f"{running.url}/metrics") as reply:
        return str(reply.read().decode())


def test_the_model_that_a_request_names_answers(
    engines: list[Engine], one_at_a_time: Running, client: openai.OpenAI
) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "second"]
    assert client.models.retrieve("second").id == "second"
    talk: Any = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    counts = []
    for name, asleep in (
        ("tiny", [False, True]),
        ("second", [True, False]),
        ("folder", [True, False]),
        ("tiny", [False, True]),
    ):
        assert client.completions.create(model=name, **ASK).choices[0].text == CIRCLE[1:]
        assert [engine.asleep for engine in engines] == asleep
        assert "mbq_models_in_memory 1.0" in metrics(one_at_a_time)
        found = client.chat.completions.create(model=name, **talk)
        assert (found.model, found.usage is not None) == (name, True)
        counts.append(found.usage.prompt_tokens if found.usage else 0)
    assert counts == [counts[0], counts[0] + 1, counts[0] + 1, counts[0]]
    with pytest.raises(openai.NotFoundError, match="'third' is unknown; this server has 'tiny', 'second'"):
        client.completions.create(model="third", **ASK)


def test_a_text_is_encoded_by_a_sleeping_model(engines: list[Engine], one_at_a_time: Running) -> None:
    body = json.dumps({"model": "second", "messages": [{"role": "user", "content": "hi"}]}).encode()
    with urllib.request.urlopen(f"{one_at_a_time.url}/tokenize", body) as reply:
        assert (
            json.load(reply)["count"]
            == len(engines[0].encode(engines[0].chat_prompt([{"role": "user", "content": "hi"}]))) + 1
        )
    assert engines[1].asleep


def test_contexts_stay_with_their_model(engines: list[Engine]) -> None:
    """With memory for both, each keeps what it read; a model that leaves takes its contexts along."""
    with serve(*engines, cache_bytes=10**7) as running:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
            cached = []
            for name in ("tiny", "second", "tiny", "second"):
                usage = client.completions.create(model=name, **{**ASK, "prompt": "x" * 20}).usage
                assert usage is not None
                assert usage.prompt_tokens_details is not None
                cached.append(usage.prompt_tokens_details.cached_tokens)
            assert cached == [0, 0, 19, 19]
        assert not any(engine.asleep for engine in engines)
        contexts = running.server.worker.contexts
        wait_for(lambda: len(contexts) == 2)
        contexts.drop(engines[0])
        assert len(contexts) == 1


def test_a_model_counts_with_what_its_engine_reads_and_one_context(engines: list[Engine]) -> None:
    engine, context_bytes = engines[0], CONTEXT * 2 * 2 * 16 * 4  # keys and values of two heads of 16, in float32
    assert engine.memory_bytes == engine.manifest.total_bytes + context_bytes
    entry = replace(engine.manifest.files[0], name="decoder.safetensors", size=10**6)
    both = replace(engine.manifest, files=(*engine.manifest.files, entry))
    assert both.engine_bytes("onnx") == engine.manifest.total_bytes == both.engine_bytes("tvm") - 10**6


def test_an_idle_server_frees_both(engines: list[Engine]) -> None:
    with serve(*engines, sleep_s=0.2) as running:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
            for name in ("second", "tiny"):
                client.completions.create(model=name, **ASK)
            wait_for(lambda: all(engine.asleep for engine in engines))
            assert "mbq_asleep 1.0" in metrics(running)
            assert client.completions.create(model="second", **ASK).choices[0].text == CIRCLE[1:]
        assert engines[0].asleep


def test_each_model_is_steered_while_it_is_in_use(engines: list[Engine]) -> None:
    log: list[str] = []

    class Steering:
        def __init__(self, engine: Engine) -> None:
            self.engine = engine

        def __enter__(self) -> Any:
            log.append(f"+{self.engine.manifest.model.name}")
            return BoundedEngine(self.engine), None

        def __exit__(self, *_: object) -> None:
            log.append(f"-{self.engine.manifest.model.name}")

    offers = named([(engine.path.name, engine, engine.manifest.budget) for engine in engines])
    with Models(offers, Steering) as models:  # type: ignore[arg-type]
        models.use(offers[0])
        models.use(offers[1])
        models.use(offers[0])
    assert log == ["+tiny", "+second", "-tiny", "+tiny", "-second", "-tiny"]


@pytest.mark.parametrize("failing", ["steer", "sleep"])
def test_a_model_that_cannot_be_taken_into_use_changes_nothing(engines: list[Engine], failing: str) -> None:
    log: list[str] = []
    broken = [failing]

    def fail(step: str) -> None:
        if broken == [step]:
            raise UsageError("events.jsonl: its folder is gone")

    @contextmanager
    def steer(engine: Engine) -> Iterator[Any]:
        name = engine.manifest.model.name
        if name == "second":
            fail("steer")
        log.append(f"+{name}")
        yield BoundedEngine(engine), name
        log.append(f"-{name}")

    offers = named([(engine.path.name, engine, engine.manifest.budget) for engine in engines])
    with Models(offers, steer, most_bytes=1) as models:
        models.before_sleep = lambda engine: fail("sleep")
        with pytest.raises(UsageError, match="is gone"):
            models.use(offers[1])
        assert (models.bounded.manifest.model.name, models.governor) == ("tiny", "tiny")
        assert not engines[0].asleep
        begun = ["+tiny"] if failing == "steer" else ["+tiny", "+second"]
        assert log == begun, "the governor of the model in use still runs"
        models.use(offers[0])
        assert log == begun
        broken.clear()
        models.use(offers[1])
        assert (models.bounded.manifest.model.name, models.governor) == ("second", "second")
        assert engines[0].asleep
    assert log == [*begun, "+second", "-tiny", "-second"]


def test_bundles_of_one_name_are_told_apart_by_their_folders(bundle: Path, tmp_path: Path) -> None:
    engines = [Engine.load(bundle, threads=1), Engine.load(copy_of(bundle, tmp_path / "b", "tiny"), threads=1)]
    names = [model.name for model in named([(engine.path.name, engine, engine.manifest.budget) for engine in engines])]
    assert names == ["bundle", "b"]
    with pytest.raises(UsageError, match="two bundles have the name 'bundle'; rename the folder of one"):
        named([("bundle", engines[0], engines[0].manifest.budget)] * 2)


def test_the_command_refuses_a_second_bundle_that_is_broken(bundle: Path, tmp_path: Path, mbq: Mbq) -> None:
    broken = copy_of(bundle, tmp_path / "broken", "second")
    (broken / "tokenizer.json").unlink()
    done = mbq(["serve", bundle, broken, "--port", 0, "--min-bits", 3])
    assert done.code == 4
    assert "tokenizer.json" in done.err
