"""Frameworks for agents: each must call a tool, read its result and answer."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, Literal

import needs
import openai
import pytest
from serving import Running

pytestmark = pytest.mark.heavy  # their packages are large

PLACE = Literal["AB", "CD"]


@pytest.fixture(scope="module")
def url(with_tools: Running) -> str:
    return f"{with_tools.url}/v1"


def test_langchain(url: str) -> None:
    chat = needs.module("langchain_openai").ChatOpenAI
    tools = needs.module("langchain_core.tools")
    asked: list[str] = []

    @tools.tool
    def tide(place: PLACE) -> str:
        """When the tide turns."""
        asked.append(place)
        return "six"

    model = chat(model="any", base_url=url, api_key="none", temperature=0, max_retries=0)
    talk: list[Any] = [("user", "A")]
    reply = model.bind_tools([tide], tool_choice="required", parallel_tool_calls=False).invoke(talk)
    (call,) = reply.tool_calls
    assert call["name"] == "tide"
    result = tide.invoke(call)
    assert asked == [call["args"]["place"]]
    assert asked[0] in ("AB", "CD")
    answer = model.bind_tools([tide], tool_choice="none").bind(max_tokens=4).invoke([*talk, reply, result])
    assert answer.content
    assert not answer.tool_calls
    assert answer.usage_metadata["input_tokens"] == len("uA" + "a" + f"<tool_call>{asked[0]}" + "tsix")
    streamed = [chunk.content for chunk in model.bind(max_tokens=4).stream(talk)]
    assert "".join(streamed) == "BCDE"


def test_llama_index(url: str) -> None:
    script = Path(__file__).with_name("llama_index_agent.py")
    command = [needs.environment("agents"), str(script), url]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["outputs"] == ["six"]
    assert found["asked"][0] in ("AB", "CD")
    assert found["answer"].startswith("yz{")  # what the tiny model says after the tool's result


def test_lm_evaluation_harness(
    running: Running, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A task of its own: which letter follows.  The tiny model knows three of four."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    harness = needs.module("lm_eval")
    needs.module("tenacity")
    questions = [("xA", "B", "C"), ("xBC", "D", "E"), ("FG", "A", "B"), ("AB", "G", "C")]
    rows = [{"text": text, "choices": [right, wrong], "label": 0} for text, right, wrong in questions]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "letters", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "task.jsonl")}, "cache_dir": str(tmp_path)},
        "doc_to_text": "{{text}}", "doc_to_choice": "choices", "doc_to_target": "label", "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    model = {
        "base_url": f"{running.url}/v1/completions", "model": "tiny", "tokenizer": str(bundle), "max_length": 90,
        "tokenizer_backend": "huggingface", "num_concurrent": 1, "max_retries": 1,
    }  # fmt: skip
    found = harness.simple_evaluate(model="local-completions", model_args=model, tasks=[task], bootstrap_iters=0)
    assert found["results"]["letters"]["acc,none"] == 0.75
    asked = found["samples"]["letters"][0]["resps"]
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        about = client.completions.create(model="tiny", prompt="xA", temperature=0, max_tokens=1, logprobs=0)
    assert about.choices[0].logprobs is not None
    assert about.choices[0].logprobs.token_logprobs is not None
    assert float(asked[0][0][0]) == pytest.approx(about.choices[0].logprobs.token_logprobs[0], abs=1e-4)
