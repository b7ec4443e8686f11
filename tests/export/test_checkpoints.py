"""What a model folder holds is used, or refused in one line before long work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from mbq_export.model.loading import check_tokens, load, read_config
from mbq_export.model.source import locate
from mbq_export.model.stop_tokens import stop_token_ids
from mbq_runtime.errors import ModelError

PROMPT = torch.arange(40)[None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", "llama")


def change_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    values = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    kept = {key: value for key, value in values.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Edit the tensors of a folder's safetensors file in place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def prepare(folder: Path) -> None:
    """What an export reads before its plan."""
    source = locate(str(folder))
    check_tokens(source, read_config(source))


def refusal(folder: Path, read: Callable[[Path], Any]) -> str:
    with pytest.raises(ModelError) as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def whole(folder: Path) -> Any:
    return load(locate(str(folder)))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(PROMPT).logits
    return found


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("name", ["llama", "granite", "qwen3_moe", "float8"])
def test_a_head_of_its_own_beside_a_tied_config(name: str, in_file: bool, tmp_path: Path) -> None:
    """The head is the one that transformers uses: that of the files, also where another path reads them."""
    folder = write_checkpoint(tmp_path / "model", "llama" if name == "float8" else name, tie_word_embeddings=True)
    head = torch.randn(load_file(folder / "model.safetensors")["model.embed_tokens.weight"].shape)
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    if name == "float8":
        float8(folder, {"quant_method": "compressed-tensors", "format": "float-quantized"}, "weight_scale", None)
    checkpoint = load(locate(str(folder)), tmp_path if in_file else None)
    assert torch.equal(checkpoint.model.lm_head.weight, head)
    assert not checkpoint.decoder.tied
    if name != "float8":
        wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(logits(checkpoint.model), logits(wanted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_head_that_is_stored_twice_is_tied(name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", name, tie_word_embeddings=True)

    def twice(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change_weights(folder, twice)
    for place in (None, tmp_path):
        assert load(locate(str(folder)), place).decoder.tied


@pytest.mark.parametrize("told", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, "mixed"])
@pytest.mark.parametrize("in_file", [False, True])
def test_weights_are_those_of_the_files_whatever_dtype_the_config_names(
    in_file: bool, stored: Any, told: str, folder: Path, tmp_path: Path
) -> None:
    def store(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.weight"] *= 100
        if stored in (torch.float32, torch.bfloat16):
            tensors["model.layers.1.input_layernorm.weight"][0] = 7e4  # more than float16 has
        for at, (name, tensor) in enumerate(tensors.items()):
            tensors[name] = tensor.to((torch.float16, torch.bfloat16)[at % 2] if stored == "mixed" else stored)

    change_weights(folder, store)
    change_json(folder / "config.json", dtype=told)
    checkpoint = load(locate(str(folder)), tmp_path if in_file else None)
    weights = dict(checkpoint.model.named_parameters())
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(weights[name], tensor.float()), name


def test_a_large_model_of_the_hub_has_the_dtype_of_its_files(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--maker--tiny" / "snapshots" / "abc"
    write_checkpoint(snapshot, "llama")
    change_json(snapshot / "config.json", dtype="bfloat16")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    program = (
        "import sys; from pathlib import Path; from mbq_export.model.loading import load; "
        "from mbq_export.model.source import locate; from safetensors.torch import load_file; "
        "found = dict(load(locate('maker/tiny'), Path(sys.argv[1])).model.named_parameters()); "
        "stored = load_file(sys.argv[2]); "
        "print(all(found[name].equal(weight) for name, weight in stored.items()), len(stored))"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(snapshot / "model.safetensors")]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split()[:1] == ["True"], done.stderr


@pytest.mark.parametrize("rows", [258, 200])
def test_more_token_ids_than_rows(tmp_path: Path, rows: int) -> None:
    folder = write_checkpoint(
        tmp_path / "model", "llama", vocab_size=rows, eos_token_id=100, bos_token_id=99, pad_token_id=0
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<a>", "<b>"])
    tokenizer.save_pretrained(folder)
    said = refusal(folder, prepare)
    assert "260 tokens" in said
    assert f"{rows} rows" in said


def test_a_placeholder_for_pictures_needs_no_row(tmp_path: Path) -> None:
    """Published text models of Gemma 3 list one token more than they have rows."""
    folder = write_checkpoint(tmp_path / "model", "gemma3_text", vocab_size=258)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image_soft_token>"])
    tokenizer.save_pretrained(folder)
    prepare(folder)


@pytest.mark.parametrize("closing", ["<end_of_turn>\n", "<|im_end|>", " <|eot|>\n"])
def test_the_template_alone_knows_the_end_of_a_turn(folder: Path, closing: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([closing.strip()])
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}" + closing.replace("\n", "\\n") + "{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    checkpoint = whole(folder)
    ids = stop_token_ids(checkpoint.tokenizer, [checkpoint.model.generation_config], checkpoint.decoder.vocab_size)
    assert ids == [257, 258]


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_already_quantised(folder: Path, method: str) -> None:
    change_json(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    assert f"already quantised (quantization_config: {method}); give the original model" in refusal(folder, prepare)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def point(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"
    (folder / "model.safetensors").write_text(text)


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def adapter_alone(folder: Path) -> None:
    for path in list(folder.iterdir()):
        path.unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')


def adapter_beside(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def own_code(folder: Path) -> None:
    change_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})


def bad_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def no_eos(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Without the key, transformers takes the family's own id.
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    change_json(folder / "tokenizer_config.json", eos_token=None)


def negative_eos(folder: Path) -> None:
    change_json(folder / "generation_config.json", eos_token_id=-1)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (cut, "cut off: "),
        (point, "a git-lfs pointer, not the file itself"),
        (empty, "not a safetensors file (0 bytes)"),
        (adapter_alone, "LoRA adapter of someone/base"),
        (adapter_beside, "LoRA adapter of someone/base"),
        (no_tokenizer, "no tokenizer"),
        (own_code, "code of a checkpoint is never run"),
        (bad_config, "config.json: not a JSON file"),
        (no_eos, "no token ends a reply"),
        (negative_eos, "eos_token_id is -1"),
    ],
)
def test_refused_before_the_weights_are_read(folder: Path, harm: Callable[[Path], None], reason: str) -> None:
    harm(folder)
    assert reason in refusal(folder, prepare)


def test_a_snapshot_in_the_cache_of_the_hub(folder: Path, tmp_path: Path) -> None:
    """Its files are links into another folder, and a hub's own files lie beside them."""
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    repository = tmp_path / "models--someone--a-model"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        file.rename(blobs / f"blob-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-of-{file.name}")
    prepare(snapshot)
    checkpoint = whole(snapshot)
    assert checkpoint.source.name == "a-model"
    expected = AutoModelForCausalLM.from_pretrained(snapshot, dtype=torch.float32)
    assert torch.equal(logits(checkpoint.model), logits(expected))


def test_a_folder_that_was_downloaded(folder: Path) -> None:
    records = folder / ".cache" / "huggingface" / "download"
    records.mkdir(parents=True)
    (records / "config.json.metadata").write_text("0\n0\n0\n")
    prepare(folder)
    assert whole(folder).source.name == folder.name


def test_a_whole_file_beside_a_stale_index(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    prepare(folder)
    whole(folder)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.1.mlp.router.weight", "extra"])
def test_a_weight_that_the_model_does_not_take(folder: Path, name: str) -> None:
    change_weights(folder, lambda tensors: tensors.update({name: torch.ones(192)}))
    assert f"the first is {name}" in refusal(folder, whole)


def test_frequencies_that_old_files_hold_are_no_weights(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(folder, lambda tensors: tensors.update({name: torch.ones(16)}))
    whole(folder)


def float8(folder: Path, quantization: dict[str, Any], scale_name: str, block: tuple[int, int] | None) -> None:
    """Store the linear layers in float8 with scales; ``block``: rows and columns per scale, None for one scale."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, weight in list(tensors.items()):
            if "proj" not in name:
                continue
            rows, columns = block or weight.shape
            shape = (-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
            scale = torch.rand(shape) / 100 + 0.01
            wide = scale.repeat_interleave(rows, 0)[: len(weight)].repeat_interleave(columns, 1)[:, : weight.shape[1]]
            tensors[name] = (weight / wide).to(torch.float8_e4m3fn)
            tensors[name.replace("weight", scale_name)] = scale if block else scale.reshape(())
            tensors[name.replace("weight", "input_scale")] = torch.tensor(1.0)

    change_weights(folder, change)
    change_json(folder / "config.json", quantization_config=quantization)


@pytest.mark.parametrize(
    ("quantization", "scale_name", "block"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "weight_scale_inv", (128, 128)),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "weight_scale", None),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "weight_scale", (1, 1 << 10)),
    ],
    ids=["fp8-blocks", "modelopt", "a-scale-a-row"],
)
def test_float8_weights_are_read_with_their_scales(
    folder: Path, quantization: dict[str, Any], scale_name: str, block: tuple[int, int] | None
) -> None:
    wanted = logits(whole(folder).model)
    float8(folder, quantization, scale_name, block)
    prepare(folder)
    found = logits(whole(folder).model)
    # Three bits of mantissa in random weights.
    assert (found - wanted).norm() < 0.2 * wanted.norm()


def test_a_float8_model_keeps_its_generation_config(folder: Path) -> None:
    float8(folder, {"quant_method": "modelopt", "quant_algo": "FP8"}, "weight_scale", None)
    change_json(folder / "generation_config.json", eos_token_id=[257, 100], temperature=0.7, do_sample=True)
    found = whole(folder).model.generation_config
    assert (found.eos_token_id, found.temperature) == ([257, 100], 0.7)


def test_float8_weights_without_scales(folder: Path) -> None:
    float8(folder, {"quant_method": "fp8"}, "weight_scale_inv", (128, 128))
    change_weights(
        folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("weight_scale_inv")]
    )
    assert "without a weight_scale beside it" in refusal(folder, whole)


def test_weights_of_another_shape(folder: Path) -> None:
    change_json(folder / "config.json", intermediate_size=352)
    refusal(folder, whole)
