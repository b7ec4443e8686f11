"""The libraries that a comparison measures: llama.cpp's files, AutoRound, GPTQ's contract, tasks of lm-eval."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import needs
import numpy as np
import pytest
import torch
from tiny_models import TINIEST, write_checkpoint

from mbq_export.compare import libraries, llama_cpp_files
from mbq_export.compare.library_worker import Request
from mbq_export.model.checkpoint import Checkpoint
from mbq_export.model.loading import load
from mbq_export.model.source import locate
from mbq_runtime.engine import Window
from mbq_runtime.errors import ModelError, UsageError

pytestmark = pytest.mark.heavy

GROUP_SIZE = 32

# Stands for GPTQModel, which wants a newer torch: it rounds to nearest and packs as GPTQModel's modules do.
FAKE_GPTQMODEL = """
import json
import torch
from transformers import AutoModelForCausalLM

class QuantizeConfig:
    def __init__(self, **options):
        self.__dict__.update(options)

class Packed(torch.nn.Module):
    def __init__(self, weight, config):
        super().__init__()
        groups = weight.reshape(-1, config.group_size)
        low = groups.amin(1, keepdim=True)
        scale = (groups.amax(1, keepdim=True) - low) / (2**config.bits - 1)
        self.decoded = ((groups - low) / scale).round().mul(scale).add(low).reshape(weight.shape)
        self.scales = scale
        self.qweight = torch.zeros(weight.numel() * config.bits // 32, dtype=torch.int32)
        self.qzeros = torch.zeros(scale.numel() * config.bits // 32, dtype=torch.int32)

    def dequantize_weight(self):
        return self.decoded.T

class GPTQModel:
    @classmethod
    def load(cls, folder, config, dtype):
        self = cls()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.config = config
        return self

    def quantize(self, rows, batch_size):
        assert rows and all(set(row) == {"input_ids", "attention_mask"} for row in rows)
        for parent in list(self.model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear) and name != "lm_head":
                    setattr(parent, name, Packed(child.weight.detach(), self.config))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load(locate(str(write_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama"))))


@pytest.fixture(scope="module")
def inputs(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as ``libraries.write_inputs`` leaves it."""
    folder = tmp_path_factory.mktemp("inputs")
    libraries.write_inputs(checkpoint, np.random.default_rng(0).integers(0, 256, (8, 32)), folder)
    return folder


def errors(checkpoint: Checkpoint, weights: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative error of every decoded weight."""
    found = {}
    for name, weight in weights.items():
        original = checkpoint.model.get_submodule(name).weight.detach()
        assert weight.shape == original.shape
        found[name] = float((weight - original).norm() / original.norm())
    return found


@pytest.mark.parametrize(("file_type", "most"), [("Q8_0", 0.01), ("Q4_0", 0.15)])
def test_llama_cpp_writes_and_reads(checkpoint: Checkpoint, tmp_path: Path, file_type: str, most: float) -> None:
    needs.module("llama_cpp")
    llama_cpp_files.write_float32(checkpoint, tmp_path / "float32.gguf")
    exact, sizes = llama_cpp_files.read_weights(tmp_path / "float32.gguf", checkpoint)
    assert max(errors(checkpoint, exact).values()) == 0
    llama_cpp_files.quantise(tmp_path / "float32.gguf", file_type, tmp_path / "out.gguf", {})
    weights, packed = llama_cpp_files.read_weights(tmp_path / "out.gguf", checkpoint)
    assert set(weights) == set(exact)
    found = errors(checkpoint, weights)
    assert 0 < max(found.values()) < most
    block = next(name for name in sizes if name.endswith("up_proj"))
    assert packed[block] == sizes[block] // 4 * {"Q8_0": 34, "Q4_0": 18}[file_type] // 32


def test_what_llama_cpp_refuses(tmp_path: Path) -> None:
    needs.module("llama_cpp")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF, but not really")
    with pytest.raises(ModelError, match=r"llama.cpp could not write Q4_0: .*; leave it out with --methods"):
        llama_cpp_files.quantise(tmp_path / "broken.gguf", "Q4_0", tmp_path / "out.gguf", {})


def test_an_importance_matrix_makes_the_important_columns_better(checkpoint: Checkpoint, tmp_path: Path) -> None:
    needs.module("llama_cpp")
    windows = np.random.default_rng(0).integers(0, checkpoint.decoder.vocab_size, (2, 32))
    found = llama_cpp_files.importance(checkpoint, windows)
    matrices = {name for name, mapped in llama_cpp_files.names(checkpoint).items() if "norm" not in mapped}
    assert checkpoint.decoder.tied  # the head has the name of the embedding
    assert len(found) == len(matrices)
    assert all((values > 0).all() for values in found.values())
    name = "model.layers.0.mlp.up_proj"
    mapped = llama_cpp_files.names(checkpoint)[f"{name}.weight"]
    found[mapped] = np.ones_like(found[mapped])
    found[mapped][::4] = 1e4
    llama_cpp_files.write_float32(checkpoint, tmp_path / "float32.gguf")
    original, changes = checkpoint.linear(name).weight, []
    for importance in ({}, found):
        llama_cpp_files.quantise(tmp_path / "float32.gguf", "Q4_0", tmp_path / "out.gguf", importance)
        weights, _ = llama_cpp_files.read_weights(tmp_path / "out.gguf", checkpoint)
        changes.append(float((weights[name] - original)[:, ::4].norm()))
    assert changes[1] < 0.9 * changes[0]


def blocks(checkpoint: Checkpoint) -> set[str]:
    linears = (name for name, module in checkpoint.model.named_modules() if isinstance(module, torch.nn.Linear))
    return {name for name in linears if name != "lm_head"}


def test_autoround(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs.module("auto_round")
    # To compile a tiny model takes longer than to round it.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    changes = {**TINIEST, "num_hidden_layers": 1}  # the library makes 200 steps in every block
    checkpoint = load(locate(str(write_checkpoint(tmp_path / "llama", "llama", **changes))))
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    libraries.write_inputs(checkpoint, np.random.default_rng(0).integers(0, 256, (8, 32)), inputs)
    weights, sizes = libraries.quantise(Request("autoround", 4, GROUP_SIZE, 0), inputs)
    assert set(weights) == set(sizes) == blocks(checkpoint)
    assert all(0 < error < 0.2 for error in errors(checkpoint, weights).values())


def test_gptq_as_its_library_is_called(
    checkpoint: Checkpoint, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gptqmodel.py").write_text(FAKE_GPTQMODEL)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(sys.path)}")
    weights, sizes = libraries.quantise(Request("gptq", 4, GROUP_SIZE, 0), inputs)
    assert set(weights) == set(sizes) == blocks(checkpoint)
    assert all(0 < error < 0.2 for error in errors(checkpoint, weights).values())
    name = next(iter(weights))
    count = weights[name].numel()
    assert sizes[name] == count // 2 + count // GROUP_SIZE * (4 + 16) // 8


def test_a_library_that_fails_is_named(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gptqmodel.py").write_text("raise RuntimeError('no kernels here')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(sys.path)}")
    with pytest.raises(ModelError, match="gptq at 4 bits failed: RuntimeError: no kernels here; leave it out"):
        libraries.quantise(Request("gptq", 4, GROUP_SIZE, 0), inputs)


class Letters:
    """A tokenizer of bytes."""

    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def after_space(tokens: list[int]) -> Window:
    """A side that expects a "b" after every space, with odds of 3 to 1 against each of the other 255 bytes."""
    logits = np.zeros((len(tokens), 256), np.float32)
    logits[np.array(tokens) == ord(" "), ord("b")] = math.log(3)
    return Window(logits, 8.0)


def test_log_likelihoods_by_hand() -> None:
    needs.module("lm_eval")
    from mbq_export.compare.zero_shot import SideModel

    model = SideModel(after_space, Letters(), [7], 64)
    assert model.eot_token_id == 0
    assert model.tok_encode("ab") == [97, 98]
    requests = [(("x", " b"), [120], [32, 98]), (("x ", "c"), [120, 32], [99])]
    (first, picked), (second, other) = model._loglikelihood_tokens(requests)
    assert first == pytest.approx(math.log(1 / 256) + math.log(3 / 258))
    assert second == pytest.approx(math.log(1 / 258))
    assert (picked, other) == (False, False)
    ((_, likeliest),) = model._loglikelihood_tokens([(("x ", "b"), [120, 32], [98])])
    assert likeliest
    for refused in (model.loglikelihood_rolling, model.generate_until):
        with pytest.raises(UsageError, match="are not run"):
            refused([])


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    needs.module("lm_eval")
    from mbq_export.compare.zero_shot import SideModel, evaluate

    rows = [{"question": "Which?", "choices": ["b", "c"], "answer": answer} for answer in (0, 0, 0, 1)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "letters.yaml").write_text(
        f"""task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.json}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
    )
    model = SideModel(after_space, Letters(), [7], 64)
    assert evaluate(model, ["letters"], None, str(tmp_path)) == {"letters acc": 0.75}
    with pytest.raises(UsageError, match=r"--lm-eval no_such_task: .*; check the names and the network"):
        evaluate(model, ["no_such_task"], None, None)
