"""Datasets, read through the datasets package from a folder of this machine, and what a hub can answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from tiny_models import write_checkpoint

from mbq_export.data.windows import calibration_windows, open_source
from mbq_export.model.checkpoint import Checkpoint
from mbq_export.model.loading import load
from mbq_export.model.source import locate
from mbq_runtime.errors import UsageError

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    found = load(locate(str(write_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama"))))
    found.tokenizer.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parquet and JSONL files laid out as on the hub: split names in the file names."""
    folder = tmp_path_factory.mktemp("dataset")
    rows = [f"row {i:03d}" for i in range(200)]
    for split, kept in (("train", rows), ("validation", rows[100:])):
        data = datasets.Dataset.from_dict(
            {"text": kept, "chat": [[{"role": "user", "content": row}] for row in kept], "id": list(range(len(kept)))}
        )
        data.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize(
    ("suffix", "expected"),
    [
        ("", "row 000\nrow 001\n"),
        ("::validation", "row 100\nrow 101\n"),
        ("::validation:chat", "<user>row 100<user>row 101"),
        ("::train:chat", "<user>row 000<user>row 001"),
    ],
)
def test_rows_become_windows(checkpoint: Checkpoint, folder: Path, suffix: str, expected: str) -> None:
    source = open_source(f"hf:{folder}{suffix}")
    assert source.name == f"hf:{folder}{suffix}"
    fitted, held_back = calibration_windows(checkpoint, source, 1, 1, len(expected))
    assert checkpoint.tokenizer.decode(fitted[0]) == expected
    assert held_back.shape == (1, len(expected))


def test_only_as_many_rows_as_needed_are_read(checkpoint: Checkpoint, folder: Path) -> None:
    source = open_source(f"hf:{folder}")
    calibration_windows(checkpoint, source, 1, 1, 8)
    unread = next(iter(source.parts[0].fitted))
    assert unread.where.endswith("row 9"), "2 windows of 8 tokens are needed, 4 times as many are read, 8 a row"


@pytest.mark.parametrize(
    ("suffix", "parts"),
    [
        ("::test", ["cannot be fetched", "test"]),
        (":english", ["cannot be fetched", "english"]),
        (":::body", ["no column 'body'", "text, chat, id"]),
        (":::id", ["row 1", "needed: a list of messages"]),
        ("-nowhere", ["cannot be fetched", "-nowhere"]),
    ],
)
def test_what_is_not_there_is_named(checkpoint: Checkpoint, folder: Path, suffix: str, parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        calibration_windows(checkpoint, open_source(f"hf:{folder}{suffix}"), 1, 1, 8)
    for part in (f"calibration dataset {folder}", *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_run_out(checkpoint: Checkpoint, folder: Path) -> None:
    with pytest.raises(UsageError, match="too short, it has 25 windows of 64 tokens, 40 are needed"):
        calibration_windows(checkpoint, open_source(f"hf:{folder}"), 30, 10, 64)


# The hub's client tries six times, and waits longer each time.
WITHOUT_WAITS = "import time; time.sleep = lambda seconds: None; from mbq_export.cli import main; main()"


@pytest.mark.heavy
def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    """The whole command: one line, before the model is loaded."""
    model = write_checkpoint(tmp_path / "llama", "llama")
    command = [sys.executable, "-c", WITHOUT_WAITS, "--target", "portable", "--model", str(model)]
    command += ["--calib-data", "hf:nobody/nothing", "--output", str(tmp_path / "out"), "--json"]
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, env=environment, timeout=300)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("mbq-export: error: calibration dataset nobody/nothing: cannot be fetched")
    assert done.stderr.count("\n") == 1


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"not installed: pip install 'mbq-export\[datasets\]'"):
        open_source("hf:owner/name")


def test_jsonl_folder_of_chats(checkpoint: Checkpoint, tmp_path: Path) -> None:
    lines = [{"messages": [{"role": "user", "content": f"{i:03d}"}]} for i in range(20)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    fitted, _ = calibration_windows(checkpoint, open_source(f"hf:{tmp_path}:::messages"), 1, 1, 18)
    assert checkpoint.tokenizer.decode(fitted[0]) == "<user>000<user>001"
