"""What a user can get wrong in an export: one clear line, the right exit code, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_checkpoint
from warm_start import Running

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(model, tmp_path / "broken"))


def export(folder: Path, *args: str | Path, limit_bytes: int | None = None) -> subprocess.CompletedProcess[str]:
    arguments = ["--target", "portable", "--calib-tokens", "512"]
    arguments += ["--output", str(folder / "out" / "bundle"), *map(str, args)]
    running = Running(arguments, limit_bytes)
    stdout, stderr = running.communicate()
    assert running.returncode is not None
    return subprocess.CompletedProcess(arguments, running.returncode, stdout, stderr)


def assert_refused(done: subprocess.CompletedProcess[str], folder: Path, code: int, *parts: str) -> None:
    errors = [line for line in done.stderr.splitlines() if line.startswith("mbq-export: error: ")]
    assert done.returncode == code, done.stderr
    assert len(errors) == 1
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in errors[0]
    assert not any((folder / "out").iterdir()) if (folder / "out").exists() else True


def test_a_good_export_and_then_output_exists(model: Path, calibration_text: Path, tmp_path: Path) -> None:
    args = ("--model", model, "--calib-data", calibration_text, "--tune-steps", "2", "--router", "norm")
    first = export(tmp_path, *args, "--json")
    assert first.returncode == 0, first.stderr
    manifest = (tmp_path / "out" / "bundle" / "manifest.json").read_bytes()
    again = export(tmp_path, *args)
    assert again.returncode == 2
    assert "--force" in again.stderr
    assert (tmp_path / "out" / "bundle" / "manifest.json").read_bytes() == manifest
    forced = export(tmp_path, *args, "--force")
    assert forced.returncode == 0, forced.stderr
    before, after = json.loads(manifest), json.loads((tmp_path / "out" / "bundle" / "manifest.json").read_bytes())
    assert before["files"] == after["files"], "the same seed gives the same bytes"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--target", "commodore"], ["commodore", "arm64", "portable"]),
        (["--slices", "3,3"], ["3,3", "8"]),
        (["--slices", "two"], ["two"]),
        (["--calib-tokens", "0"], ["0", "4096"]),
        (["--method", "rtn", "--tune-steps", "8"], ["--tune-steps 8", "rtn", "leave it out"]),
        (["--slices", "8", "--router", "mlp"], ["--router mlp", "slices 8", "leave it out"]),
        (["--target", "mali-rk3588", "--activations", "8"], ["--activations 8", "mali-rk3588", "leave it out"]),
        (["--device", "warp"], ["--device warp", "usable here: cpu"]),
        (["--device", "meta"], ["--device meta", "usable here: cpu"]),
        (["--plot", "nowhere/curve.png"], ["nowhere/curve.png", ".svg"]),
    ],
)
def test_bad_arguments(model: Path, tmp_path: Path, args: list[str], parts: list[str]) -> None:
    assert_refused(export(tmp_path, "--model", model, *args), tmp_path, 2, *parts)


def test_group_size_that_does_not_divide(model: Path, tmp_path: Path) -> None:
    done = export(tmp_path, "--model", model, "--group-size", "128")
    assert_refused(done, tmp_path, 2, "128", "K = 192", "layers.0.attn_in", "--group-size 64")


def test_no_such_model(tmp_path: Path) -> None:
    assert_refused(export(tmp_path, "--model", "./nowhere"), tmp_path, 3, "nowhere", "smollm2-135m")


def test_folder_without_weights(broken: Path, tmp_path: Path) -> None:
    (broken / "model.safetensors").unlink()
    assert_refused(export(tmp_path, "--model", broken), tmp_path, 3, "no weights", "model.safetensors")


def test_missing_shard(broken: Path, tmp_path: Path) -> None:
    index = {
        "metadata": {},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    (broken / "model.safetensors").rename(broken / "model-00001-of-00002.safetensors")
    done = export(tmp_path, "--model", broken)
    assert_refused(done, tmp_path, 3, "1 of 2", "model-00002-of-00002.safetensors")


def test_missing_tensor(broken: Path, tmp_path: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    done = export(tmp_path, "--model", broken)
    assert_refused(done, tmp_path, 3, "model.layers.1.mlp.up_proj.weight")


def test_unsupported_architecture(broken: Path, tmp_path: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    config |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    (broken / "config.json").write_text(json.dumps(config))
    done = export(tmp_path, "--model", broken)
    assert_refused(done, tmp_path, 3, "GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM")


def test_nan_weights(broken: Path, tmp_path: Path, calibration_text: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    done = export(tmp_path, "--model", broken, "--calib-data", calibration_text)
    assert_refused(done, tmp_path, 3, "model.layers.0.mlp.up_proj.weight", "NaN")


def test_calibration_files(model: Path, tmp_path: Path) -> None:
    for content, part in ((b"", "empty"), (b"\xff\xfe\xfa", "UTF-8"), (b"too short", "tokens")):
        file = tmp_path / "calibration.txt"
        file.write_bytes(content)
        assert_refused(export(tmp_path, "--model", model, "--calib-data", file), tmp_path, 2, part)
    assert_refused(export(tmp_path, "--model", model, "--calib-data", tmp_path / "no"), tmp_path, 2, "cannot be read")


def test_disk_full_in_the_middle(model: Path, calibration_text: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands for the end of the disk: both come as an OSError of a write."""
    args = ("--model", model, "--calib-data", calibration_text)
    for method, part in (("rtn", "the unfinished bundle was removed"), ("nested", "run the same command again")):
        done = export(tmp_path, *args, "--method", method, limit_bytes=200_000)
        assert done.returncode == 4
        assert "writing failed" in done.stderr
        assert part in done.stderr
        assert "Traceback" not in done.stderr
        # What was finished, and no half of a bundle.
        assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".calibration"]


def test_interrupt(model: Path, calibration_text: Path, tmp_path: Path) -> None:
    arguments = ["--target", "portable", "--model", str(model), "--calib-data", str(calibration_text)]
    process = Running([*arguments, "--calib-tokens", "4096", "--output", str(tmp_path / "out" / "b")])
    while "tuning" not in process.stderr.read_text(encoding="utf-8"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=120)[1]
    assert process.returncode == 130, rest
    assert "Traceback" not in rest
    # What a second run goes on from, and no half of a bundle.
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".calibration"]
