"""The public names of ``mbq_runtime``, and the examples in their docstrings."""

from __future__ import annotations

import doctest
import inspect
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import mbq_runtime
from mbq_runtime import Engine

PUBLIC = {
    "mbq_runtime": [
        "BundleError", "Engine", "Generation", "GenerationStats", "MbqError", "UsageError", "__version__",
    ],
    "mbq_runtime.bundle": [
        "Budget", "FileEntry", "FileRange", "Linear", "Manifest", "ModelFacts", "Quality", "QualityPoint",
        "RouterFacts", "SliceProfile", "TargetFacts", "Weights", "check_contents", "check_sizes", "file_entries",
        "read_manifest", "verify_bundle", "write_manifest",
    ],
    "mbq_runtime.control": [
        "POLICIES", "RUNGS", "TRIGGERS", "Band", "BoundedEngine", "Decision", "Event", "Governor", "JsonLines",
        "Ladder", "MeteredReply", "Piece", "Policy", "Rung", "State", "Status", "Trigger", "climb", "find_policy",
        "start", "step",
    ],
    "mbq_runtime.engine": [
        "Engine", "FinishReason", "Generation", "GenerationStats", "Grammar", "KeptContext", "Likelihood", "Passes",
        "Prompt", "Sampling", "Score", "Session", "TokenListener", "Window",
    ],
    "mbq_runtime.sensing": ["Kind", "Readings", "Sensors", "Signal", "aggregate", "power"],
}  # fmt: skip
"""By module.  A change of this list is a change of the API: it belongs in CHANGELOG.md and docs/stability.md."""

EXAMPLES_ELSEWHERE = (
    "mbq_runtime.bench",
    "mbq_runtime.commands.common",
    "mbq_runtime.engine.sampling",
    "mbq_runtime.engine.score",
    "mbq_runtime.perplexity",
)
"""Modules whose examples run too, though their names are not public."""


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module: str) -> None:
    found = import_module(module)
    assert sorted(found.__all__) == sorted(PUBLIC[module])
    for name in found.__all__:
        assert getattr(found, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = found.Motor


def _homes(module: str) -> set[str]:
    """The modules that define a room's public names, and the room itself."""
    room = import_module(module)
    own = [getattr(room, name) for name in room.__all__]
    homes = {one.__module__ for one in own if inspect.isclass(one) or inspect.isfunction(one)}
    return {module} | {home for home in homes if home.startswith("mbq_runtime.")}


def _examples(module: ModuleType) -> dict[str, doctest.DocTest]:
    """The examples of a module, by the full name of what they belong to."""
    return {test.name: test for test in doctest.DocTestFinder().find(module) if test.examples}


HOMES = sorted({home for module in PUBLIC for home in _homes(module)} | set(EXAMPLES_ELSEWHERE))


@pytest.fixture
def named_bundle(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples load "my-bundle" from the working directory."""
    (tmp_path / "my-bundle").symlink_to(bundle)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("module", HOMES)
def test_examples_run(module: str, named_bundle: None) -> None:
    found = import_module(module)
    runner = doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    for test in _examples(found).values():
        runner.run(test)
    assert runner.failures == 0


def test_the_front_doors_have_examples() -> None:
    for module in ("mbq_runtime", "mbq_runtime.bundle", "mbq_runtime.control", "mbq_runtime.sensing"):
        assert module in _examples(import_module(module))
    for name in ("Engine", "Generation", "Session"):
        home = getattr(import_module("mbq_runtime.engine"), name).__module__
        assert f"{home}.{name}" in _examples(import_module(home))


def test_no_example_is_skipped() -> None:
    """An example that does not run cannot be trusted."""
    for module in HOMES:
        for name, test in _examples(import_module(module)).items():
            assert not any(doctest.SKIP in example.options for example in test.examples), name


def test_signatures() -> None:
    generate = inspect.signature(Engine.generate).parameters
    assert list(generate) == [
        "self", "prompt", "max_tokens", "avg_bits", "chat", "temperature", "top_k", "top_p", "seed", "stop",
        "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "grammar",
        "shown",
        "template_kwargs", "reasoning_budget", "session", "continues",
    ]  # fmt: skip
    load = inspect.signature(Engine.load).parameters
    assert list(load) == ["path", "threads", "avg_bits", "context", "engine"]
    for parameters, positional in ((generate, 2), (load, 1)):
        kinds = [one.kind for one in parameters.values()]
        assert kinds[positional:] == [inspect.Parameter.KEYWORD_ONLY] * (len(kinds) - positional)


def test_version_is_that_of_the_distribution() -> None:
    assert mbq_runtime.__version__[0].isdigit()


def test_running_a_bundle_leaves_nothing_in_the_home_folder(bundle: Path, tmp_path: Path) -> None:
    """Official builds of the engines report usage by default; ``import_engine`` switches that off."""
    code = (
        "import sys; from mbq_runtime.engine import Engine, Session\n"
        "Session(sys.argv[1]).run([5], 4.0); print(Engine.load(sys.argv[1]).generate('A').text())"
    )
    hidden = ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_DATA_HOME")
    environment = {key: value for key, value in os.environ.items() if key not in hidden} | {"HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code, str(bundle)], env=environment, check=True, capture_output=True)
    assert list(tmp_path.iterdir()) == []
