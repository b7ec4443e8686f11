from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mbq_runtime


def test_public_names() -> None:
    assert mbq_runtime.__all__ == ["BundleError", "Engine", "Generation", "GenerationStats", "MbqError", "UsageError"]
    for name in mbq_runtime.__all__:
        assert inspect.isclass(getattr(mbq_runtime, name))
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = mbq_runtime.Motor


def test_signatures() -> None:
    generate = inspect.signature(mbq_runtime.Engine.generate).parameters
    assert list(generate) == [
        "self", "prompt", "max_tokens", "avg_bits", "chat", "temperature", "top_k", "top_p", "seed", "stop",
    ]  # fmt: skip
    assert list(inspect.signature(mbq_runtime.Engine.load).parameters) == [
        "path",
        "threads",
        "avg_bits",
        "context",
        "engine",
    ]


def test_running_a_bundle_leaves_nothing_in_the_home_folder(bundle: Path, tmp_path: Path) -> None:
    """The engines' own builds report usage by default; ours has them keep quiet."""
    code = (
        "import sys; from mbq_runtime.engine import Engine, Session\n"
        "Session(sys.argv[1]).run([5], 4.0); print(Engine.load(sys.argv[1]).generate('A').text())"
    )
    hidden = ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_DATA_HOME")
    environment = {key: value for key, value in os.environ.items() if key not in hidden} | {"HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code, str(bundle)], env=environment, check=True, capture_output=True)
    assert list(tmp_path.iterdir()) == []
