"""What a checkpoint or an option must not say is refused before the plan, in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tiny_models import COMMON, MODELS, write_checkpoint
from transformers import AutoConfig
from warm_start import Running

from mbq_export.cli import command
from mbq_export.data.windows import open_source
from mbq_export.lines import one_line
from mbq_export.model.boundary import reading
from mbq_export.model.config_schema import MOST_LAYERS, check_values
from mbq_export.model.loading import load, read_config
from mbq_export.model.source import locate
from mbq_export.options import Options
from mbq_runtime.errors import BundleError, ModelError, UsageError
from mbq_targets.constants import MOST_HEAD_DIM


@pytest.mark.parametrize("name", MODELS)
def test_configs_of_every_family_pass(name: str) -> None:
    config = AutoConfig.for_model(**{"model_type": name, **COMMON, **MODELS[name]})
    check_values(config.to_dict(), name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 0}, f"num_hidden_layers is 0; a whole number from 1 to {MOST_LAYERS} is needed"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1"),
        ({"hidden_size": "192"}, "hidden_size is '192'"),
        ({"vocab_size": 10**400}, "vocab_size is a number over 10^30"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan; a number from 1e-30 to 1 is needed"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rope_theta": math.inf}, "rope_theta is inf"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_parameters.rope_theta is -1"),
        ({"rope_parameters": {"full_attention": {"factor": 0}}}, "rope_parameters.full_attention.factor is 0"),
        ({"rope_scaling": {"short_factor": [1, math.nan]}}, "rope_scaling.short_factor is [1, nan]"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; an object is needed"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"num_key_value_heads": 4}, "num_attention_heads is 6, num_key_value_heads is 4; the second must divide"),
        ({"head_dim": None, "hidden_size": 190}, "hidden_size is 190, num_attention_heads is 6"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers, num_hidden_layers is 2"),
        ({"layer_types": 5}, "layer_types is 5; a list of names is needed"),
        ({"no_rope_layers": [1]}, "no_rope_layers names 1 layers, num_hidden_layers is 2; they must be equal"),
        ({"conv_L_cache": -3}, "conv_L_cache is -3; a whole number from 1 to 64 is needed"),
        ({"embedding_multiplier": math.inf}, "embedding_multiplier is inf; a number from 1e-06 to 1e+06 is needed"),
        ({"residual_multiplier": 0}, "residual_multiplier is 0"),
        ({"attention_multiplier": -1.0}, "attention_multiplier is -1.0"),
        ({"logits_scaling": math.nan}, "logits_scaling is nan"),
        ({"attn_logit_softcapping": -5.0}, "attn_logit_softcapping is -5.0; a number from 0 to 1e+06 is needed"),
        ({"final_logit_softcapping": math.nan}, "final_logit_softcapping is nan"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; true or false is needed"),
    ],
)
def test_values_of_a_config(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError) as caught:
        check_values({**COMMON, **changes}, "here: config.json")
    assert str(caught.value).startswith(f"here: config.json: {said}")
    assert "\n" not in str(caught.value)


ASKED: dict[str, Any] = {
    "output": "out", "engine": "onnx", "slices": "3,1,2,2", "group_size": "auto", "activation_bits": 16,
    "method": "rtn", "tune_steps": None, "router": "auto", "floor_ratio": 1.25, "calib_data": None,
    "calib_tokens": None, "device": "cpu", "seed": 0, "force": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 10**30}, "--seed 1000"),
        ({"seed": -1}, "--seed -1: a whole number from 0"),
        ({"floor_ratio": math.nan}, "--floor-ratio nan"),
        ({"floor_ratio": math.inf}, "--floor-ratio inf"),
        ({"floor_ratio": 0.5}, "--floor-ratio 0.5: 1 or more, and finite, is needed"),
        ({"tune_steps": -1}, "--tune-steps -1"),
        ({"calib_tokens": 10**30}, "--calib-tokens 1000"),
        ({"output": "n" * 300}, "--output nnn"),
        ({"output": "a\0b"}, "--output a b: "),
        ({"output": "."}, "--output .: it names no folder"),
        ({"sign": Path("nowhere")}, "nowhere: the key cannot be read"),
    ],
)
def test_values_of_options(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Options.of("model", ["portable"], **{**ASKED, **changes})
    assert str(caught.value).startswith(said)
    assert one_line(str(caught.value)) == str(caught.value)


def test_no_name_of_a_model_or_a_dataset() -> None:
    with pytest.raises(ModelError, match=r"^model '': it is empty"):
        locate("")
    with pytest.raises(UsageError, match=r"^--calib-data hf:: it names no dataset; needed hf:OWNER/NAME"):
        open_source("hf:")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", "llama")


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "head_dim", "share", "options", "remedy"),
    [
        (
            "glm4",
            32,
            0.25,
            ("portable",),
            "8 channels .* a multiple of 16; choose a target with kernels, such as host$",
        ),
        ("phi3", 32, 0.75, ("portable",), "24 channels .* choose a target with kernels, such as host$"),
        ("glm4", 48, 0.5, ("portable",), "24 channels .* such as host$"),
        ("glm4", 48, 0.5, ("rpi5",), None),
        # Kernels of 8-bit keys and values take no head that is so wide.
        ("glm4", MOST_HEAD_DIM + 32, 0.25, ("portable",), "channels .* such as host, and --engine tvm$"),
        ("glm4", MOST_HEAD_DIM + 32, 0.25, ("rpi5",), "channels .* use --engine tvm$"),
        ("glm4", 32, 0.25, ("rpi5", "--kv", "32"), "8 channels .* leave --kv out$"),
        ("glm4", 32, 0.25, ("rpi5", "--kv", "32", "--engine", "tvm"), None),
        ("glm4", 32, 0.25, ("rpi5",), None),
        ("glm4", 32, 0.5, ("portable",), None),
        ("glm4", 32, 1.0, ("portable",), None),
        ("lfm3", 32, 0.25, ("portable",), None),  # all channels are rotated, some of them by nothing
    ],
)
def test_a_part_of_a_head_that_stock_attention_does_not_rotate(
    name: str, head_dim: int, share: float, options: tuple[str, ...], remedy: str | None, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One fact a sentence. " * 2000)
    changes: dict[str, Any] = {"partial_rotary_factor": share, "head_dim": head_dim}
    if name == "phi3":  # it has no key for the width of a head
        changes = {"partial_rotary_factor": share, "hidden_size": 192, "num_attention_heads": 6}
    if name == "lfm3":
        changes = {}
    model = write_checkpoint(tmp_path / name, name, **changes)
    arguments = ["--model", str(model), "--output", str(tmp_path / "out"), "--calib-data", str(text), "--dry-run"]
    arguments += ["--target", *options]
    if remedy is None:
        command(arguments, standalone_mode=False)
        return
    with pytest.raises(UsageError, match=remedy):
        command(arguments, standalone_mode=False)


def test_a_config_of_more_weights_than_the_files_hold(folder: Path) -> None:
    change(folder / "config.json", num_hidden_layers=900)
    with pytest.raises(ModelError, match=r"model: config\.json describes \d+ weights, the files hold \d+"):
        read_config(locate(str(folder)))


def test_a_generation_config_that_cannot_be_saved(folder: Path) -> None:
    change(folder / "generation_config.json", max_new_tokens=[1])
    with pytest.raises(ModelError, match=r"model: (generation config|weights)"):
        load(locate(str(folder)))


def test_every_failure_in_reading_is_one_line_of_a_model_error() -> None:
    class PanicException(BaseException):
        """As the tokenizers library raises one."""

    for error in (
        ValueError("bad\nvalue\x1b[31m"),
        KeyError("x"),
        RecursionError(),
        MemoryError(),
        PanicException("p"),
    ):
        with pytest.raises(ModelError, match=r"^model: tokenizer") as caught, reading("model", "tokenizer"):
            raise error
        assert str(caught.value).isprintable()
        assert caught.value.__cause__ is error
    for error in (KeyboardInterrupt(), SystemExit(), BundleError("as it is")):
        with pytest.raises(type(error)) as kept, reading("model", "tokenizer"):
            raise error
        assert kept.value is error


@pytest.mark.heavy
def test_the_log_has_the_trace_of_an_error(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("[]")
    said = []
    for more in ([], ["-v"]):
        running = Running(["--target", "portable", "--model", str(folder), *more])
        said.append(running.communicate()[1])
        assert running.returncode == ModelError.exit_code
    quiet, told = said
    assert len(quiet.splitlines()) == 1
    assert "Traceback" in told
    assert told.splitlines()[-1] == quiet.strip()
