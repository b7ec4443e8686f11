"""Published models of every family: the plan of an export, made from a config and files of the right size alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from published import CONFIGS
from tiny_models import tokenizer

from mbq_export import devices
from mbq_export.cli import command
from mbq_export.model.loading import read_config
from mbq_export.model.source import locate

GIB = 1 << 30
# A Pi 5 or a phone has 8 GB; calibration maps the weights of a large model from a file.
MOST_MEMORY = 14 * GIB


def folder_of(name: str, folder: Path) -> Path:
    """A model folder whose weights are a file with holes: it says how many there are, and takes no room."""
    config, parameters = CONFIGS[name]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer().save_pretrained(folder)
    count = int(parameters)
    header = json.dumps({"all": {"dtype": "BF16", "shape": [count], "data_offsets": [0, 2 * count]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * count)
    return folder


def plan(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(devices, "free_bytes", lambda device: 1 << 50)
    monkeypatch.setattr("mbq_export.prepare.shutil.disk_usage", lambda path: type("Disk", (), {"free": 1 << 50})())
    options = ["--model", folder_of(name, tmp_path / name), "--target", "rpi5", "--output", tmp_path / "bundle"]
    options += ["--slices", "3,1,2,2", "--device", "cpu", "--dry-run", "--json"]
    said = CliRunner().invoke(command, [str(option) for option in options], catch_exceptions=False)
    assert said.exit_code == 0, said.output
    document: dict[str, Any] = json.loads(said.stdout)
    return document


@pytest.mark.parametrize("name", CONFIGS)
def test_the_plan_of_a_published_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, (_, parameters) = plan(name, tmp_path, monkeypatch), CONFIGS[name]
    assert found["parameters"] == pytest.approx(parameters, rel=0.02)
    read, routed = found["bytes_per_token"], found["read_parameters"]
    assert list(read) == ["3", "4", "6", "8"]
    # A scale and a zero of a byte each for 64 weights or fewer, and the routers.
    for bits, size in read.items():
        assert routed * int(bits) / 8 < size < routed * (int(bits) / 8 + 0.1)
    assert found["outputs"][0]["disk_bytes"] > read["8"]
    # Of experts, those that no token of a pass takes may stay in mapped files.
    assert routed < found["peak_memory_bytes"] < MOST_MEMORY + 2 * parameters


def test_the_memory_of_a_context_with_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of 6 of 24 layers, in 8 bits, with scales.  Of the others 3 tokens before their convolution, and
    16 memories."""
    found = plan("Qwen3.5-0.8B", tmp_path, monkeypatch)["context_bytes"]
    assert found == {"each_token": 2 * 6 * 2 * (256 + 4), "states": 18 * 4 * (6144 * 3 + 16 * 128 * 128)}
    assert plan("LFM2-1.2B", tmp_path, monkeypatch)["context_bytes"]["states"] == 10 * 4 * 2048 * 2
    assert plan("EXAONE-4.0-1.2B", tmp_path, monkeypatch)["context_bytes"]["states"] == 0


def test_a_token_reads_one_row_of_per_layer_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of Gemma 4 E2B is half of its weights, and a row of it a thousandth of what a token reads."""
    found = plan("gemma-4-E2B-it", tmp_path, monkeypatch)
    table = 262144 * 35 * 256
    assert found["parameters"] - found["routed_parameters"] == table
    assert found["outputs"][0]["disk_bytes"] > found["bytes_per_token"]["8"] + table
    row = 35 * 256 * (1 + 2 / 64) + 2
    routed = sum(n * k for n, k in read_config(locate(str(tmp_path / "gemma-4-E2B-it"))).unit_shapes().values())
    assert found["routed_parameters"] == routed
    per_bit = (found["bytes_per_token"]["8"] - found["bytes_per_token"]["4"]) / 4
    assert per_bit == pytest.approx(routed / 8)
    assert found["bytes_per_token"]["8"] < 1.1 * routed + row
    # 12 blocks with keys and values of 256 channels, 3 of 512.
    assert found["context_bytes"] == {"each_token": 2 * 4 * (12 * 256 + 3 * 512), "states": 0}


def test_what_the_configs_say_of_blocks(tmp_path: Path) -> None:
    of = {name: read_config(locate(str(folder_of(name, tmp_path / name)))) for name in CONFIGS}
    smollm = of["SmolLM3-3B"]
    assert [layer for layer in range(36) if smollm.rotary_kind(layer) is None] == list(range(3, 36, 4))
    granite = of["granite-4.0-micro"]
    assert (granite.attention_scale, granite.embedding_scale, granite.logits_scale) == (1 / 64, 12, 0.1)
    assert granite.branch_scale == pytest.approx(0.22)
    assert [layer for layer in range(16) if of["LFM2-1.2B"].mixer(layer) == "attn"] == [2, 5, 8, 10, 12, 14]
    assert of["LFM2-1.2B"].ffn_size == 8192
    lfm = of["LFM3-1.7B"]
    assert [lfm.layer_kinds.count(kind) for kind in ("conv", "sliding_attention", "full_attention")] == [13, 5, 6]
    assert (lfm.conv_taps, lfm.sliding_window, lfm.role_shapes["attn_in"]) == (7, 256, (3072 + 16, 2048))
    gemma = of["gemma-4-E2B-it"]
    # Google names 2.3 G weights without the table of per-layer embeddings.
    assert gemma.parameters - gemma.vocab_size * gemma.per_layer_width == pytest.approx(2.3e9, rel=0.02)
    assert sorted(gemma.caches) == list(range(15))
    assert [gemma.heads_of(layer).source for layer in (3, 4, 15, 19, 33, 34)] == [3, 4, 13, 14, 13, 14]
    assert gemma.shapes(4)["attn_in"] == (8 * 512 + 2 * 512, 1536)
    assert gemma.shapes(18)["attn_in"] == (8 * 256, 1536)
    assert (gemma.shapes(14)["mlp_in"], gemma.shapes(15)["mlp_in"]) == ((2 * 6144, 1536), (4 * 6144, 1536))
    assert gemma.shapes(0)["ple_out"] == (1536, 256)
    assert (gemma.logits_cap, gemma.attention_scale, gemma.window(0), gemma.window(4)) == (30, 1, 512, None)
    assert of["gemma-4-E4B-it"].shapes(41)["mlp_in"] == (2 * 10240, 2560)
    assert of["gemma-2-2b-it"].attention_cap == 50
    assert of["gemma-2-2b-it"].logits_cap == 30
    olmo = of["Olmo-3-7B-Instruct"]
    assert [layer for layer in range(32) if olmo.window(layer) is None] == list(range(3, 32, 4))
    assert olmo.input_norm(0, "attn_in") is None
    assert of["EXAONE-4.0-1.2B"].rotates is None  # without windows all layers rotate
    growth = of["Ministral-3-3B-Instruct-2512"].query_growth
    assert growth is not None
    assert (growth.beta, growth.original) == (0.1, 16384)
    qwen = of["Qwen3.5-0.8B"]
    assert [layer for layer in range(24) if qwen.mixer(layer) == "attn"] == list(range(3, 24, 4))
    assert qwen.role_shapes["delta_in"] == (3 * 2048 + 2048 + 2 * 16, 1024)
    assert qwen.role_shapes["attn_in"] == (2 * 2048 + 2 * 512, 1024)
    assert qwen.delta is not None
    assert qwen.delta.states == {"conv": (6144, 3), "recurrent": (16, 128, 128)}
    assert of["Qwen3.5-4B"].role_shapes["delta_out"] == (2560, 4096)
    assert of["MiniCPM5-1B"].family.model_type == "llama"
