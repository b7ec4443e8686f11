"""The files of every side of ``versus.py``, made once in a work folder and used again by later runs.

Each side gets the same checkpoint: as a bundle, as GGUF files that llama.cpp quantises itself from the
float32 one, and as onnxruntime-genai's own builder writes it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mbq_export.calibrated import Calibrated, RoutedLinear
from mbq_export.compare import llama_cpp_files
from mbq_export.format.router import RouterParams
from mbq_export.methods import MLP_HIDDEN
from mbq_export.model.loading import load
from mbq_export.model.sliced_linear import values_at
from mbq_export.model.source import locate
from mbq_export.options import Options
from mbq_export.prepare import prepare
from mbq_export.routing import thresholds
from mbq_export.slicing import rtn
from mbq_export.write import bundle
from mbq_runtime.bundle.facts import QualityPoint
from mbq_runtime.bundle.file_names import OPS_LIBRARY
from mbq_runtime.bundle.manifest import read
from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_targets.build import build_ops_library
from mbq_targets.machines import TARGETS, Target
from mbq_targets.spec import KernelSpec

GGUF_TYPES = ("Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M", "Q6_K", "Q8_0")
GENAI_PRECISIONS = ("int4", "int8")
OWN_ENGINES = ("onnx", "tvm")
OURS = {"mbq": ("mbq", 16), "mbq tvm": ("mbq tvm", 16), "mbq a8": ("mbq", 8), "mbq tvm a8": ("mbq tvm", 8)}
"""This project's sides: what the worker runs, and the bits of activations."""

KvBits = int | Literal["auto"]
"""As ``mbq-export --kv``."""

_TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
"""So that a random model can have conversations."""

_LLAMA_1B: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 32000, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257,
}  # fmt: skip


@dataclass(frozen=True)
class Side:
    """One column of the comparison: what a worker loads.  bits: the budgets a bundle is timed at, else empty."""

    name: str
    engine: str
    path: Path
    bits: tuple[float, ...] = ()

    @property
    def size_bytes(self) -> int:
        files = [self.path] if self.path.is_file() else [f for f in self.path.rglob("*") if f.is_file()]
        return sum(file.stat().st_size for file in files)


def _random_1b(folder: Path) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**_LLAMA_1B)).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)} | {"<bos>": 256, "<eos>": 257}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
    made.chat_template = _TEMPLATE
    made.save_pretrained(folder)


def _smollm2(folder: Path) -> None:
    checkpoint = load(locate("smollm2-135m"))
    # What was read from a GGUF file refuses to be saved as it is.
    shape = {name: value for name, value in checkpoint.model.config.to_dict().items() if name != "quantization_config"}
    plain = LlamaForCausalLM(LlamaConfig(**shape))
    plain.load_state_dict(checkpoint.model.state_dict())
    plain.save_pretrained(folder)
    checkpoint.tokenizer.save_pretrained(folder)


CHECKPOINTS: dict[str, Callable[[Path], None]] = {"llama-1b": _random_1b, "smollm2-135m": _smollm2}
"""By name: writes a Hugging Face folder."""


def spread_router(profile: SliceProfile, share: float, hidden: int, k: int) -> RouterParams:
    """A learned router by size and cost, which gives a unit the depth that its place among the parameters tells:
    of a budget between two depths, just so many parameters get the deeper one.  share: 0..1, that place."""
    bits = np.asarray(profile.depth_bits, np.float32)
    rng = np.random.default_rng(k)
    return RouterParams(
        bias=-(bits[:-1] + share * np.diff(bits)).astype(np.float32),
        norm_gain=np.zeros(len(bits) - 1, np.float32),
        budgets=thresholds.budgets(profile),
        thresholds=-thresholds.budgets(profile),
        w1=rng.standard_normal((hidden, k)).astype(np.float16),
        b1=np.zeros(hidden, np.float32),
        w2=np.zeros((len(bits) - 1, hidden), np.float32),
    )


def write_bundle(
    model: Path, profile: SliceProfile, activation_bits: int, kv_bits: KvBits, target: Target, out: Path
) -> None:
    """A bundle for a target that this machine can run, rounded to nearest.  Its speed is that of a calibrated one:
    bytes, ops and routers of the same size, but no text is run through the model."""
    options = Options(
        model=str(model), outputs={out: target}, profiles=(profile,), group_size="auto",
        activation_bits=activation_bits, method="rtn", engines=OWN_ENGINES, tune_steps=0, router="mlp",
        floor_ratio=1.25, calib_data=None, calib_tokens=1, device="cpu", seed=0, force=False, kv_bits=kv_bits,
    )  # fmt: skip
    prepared = prepare(options)
    checkpoint = load(prepared.source)
    d, group_size = checkpoint.decoder, prepared.plan.group_size
    units, seen = {}, 0.0
    for unit in d.units():
        sliced = rtn.slice_unit(checkpoint, unit, group_size, profile)
        share = (seen + sliced.codes.size / 2) / prepared.plan.routed_parameters
        seen += sliced.codes.size
        router = spread_router(profile, share, MLP_HIDDEN, sliced.codes.shape[1])
        units[unit.name] = RoutedLinear(unit, sliced, checkpoint.bias(unit), router)
    scale = np.ones(d.hidden_size, np.float32)
    if d.tied:  # the bundle reads rows of the head, and the check of the bundle asks the checkpoint
        rows = values_at(units[d.head.name].sliced, profile, profile.depths, device=checkpoint.device)
        checkpoint.model.get_input_embeddings().weight.data.copy_(rows)
    table = None if d.tied else rtn.slice_weight(checkpoint.embedding(), group_size, profile, "embedding")
    curve = tuple(QualityPoint(bits, bits, 1.0, 0.0, 1.0) for bits in (float(profile.min_bits), 8.0))
    calibrated = Calibrated(profile, group_size, "mlp", units, table, scale, reference_perplexity=1.0, curve=curve)
    bundle.write_bundle(prepared, out, checkpoint, calibrated, calibration={"method": "rtn"})


def has_these_kernels(folder: Path) -> bool:
    """Whether a bundle of an earlier run has the kernels of this one."""
    manifest = read(folder)
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(scratch, "ops.so")
        spec = KernelSpec(manifest.profile, manifest.group_size, manifest.activation_bits, manifest.kv_bits)
        build_ops_library(TARGETS[manifest.target.name], spec, built)
        return built.read_bytes() == (folder / OPS_LIBRARY).read_bytes()


def _once(path: Path, write: Callable[[Path], object]) -> Path:
    """``path``, written under another name first if it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"part-{path.name}")
        shutil.rmtree(draft, ignore_errors=True)
        draft.unlink(missing_ok=True)
        print(f"making {path}", file=sys.stderr, flush=True)
        write(draft)
        draft.rename(path)
    return path


def _run(*command: object) -> None:
    done = subprocess.run([sys.executable, "-m", *map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-2000:]}")


def checkpoint_of(work: Path, model: str) -> Path:
    """The Hugging Face folder of a model."""
    return _once(work / model / "checkpoint", CHECKPOINTS[model])


def own_bundle(
    work: Path, model: str, slices: str, activation_bits: int, target: Target, kv_bits: KvBits = "auto"
) -> Path:
    """This project's bundle of a model for a target, with the kernels of now."""
    place = work / model / f"mbq-{slices.replace(',', '')}-a{activation_bits}-kv-{kv_bits}-{target.name}"
    if place.exists() and not has_these_kernels(place):
        shutil.rmtree(place)
    checkpoint = checkpoint_of(work, model)
    profile = SliceProfile.parse(slices)
    return _once(place, lambda out: write_bundle(checkpoint, profile, activation_bits, kv_bits, target, out))


def has_llama_cpp() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def gguf(work: Path, model: str, name: str) -> Path:
    """A model as llama.cpp quantises it.  name: one of ``GGUF_TYPES``."""

    def float32(out: Path) -> None:
        llama_cpp_files.write_float32(load(locate(str(checkpoint_of(work, model)))), out)

    def quantised(out: Path) -> None:
        llama_cpp_files.quantise(_once(work / model / "f32.gguf", float32), name, out, {})

    return _once(work / model / f"{name}.gguf", quantised)


def sides(work: Path, model: str, slices: str, bits: tuple[float, ...], target: Target) -> Iterator[Side]:
    """All sides of a model that can be had here, their files made when missing.  target: of this project's sides."""
    for name, (engine, activation_bits) in OURS.items():
        yield Side(name, engine, own_bundle(work, model, slices, activation_bits, target), bits)
    for name in GGUF_TYPES if has_llama_cpp() else ():
        yield Side(f"llama.cpp {name}", "llama.cpp", gguf(work, model, name))
    checkpoint = checkpoint_of(work, model)
    # What its builder needs besides.
    can_build = importlib.util.find_spec("onnx_ir") is not None
    for precision in GENAI_PRECISIONS if can_build else ():

        def build(out: Path, precision: str = precision) -> None:
            builder = ("-m", checkpoint, "-o", out, "-p", precision, "-e", "cpu", "-c", out / "cache")
            _run("onnxruntime_genai.models.builder", *builder, "--extra_options", "accuracy_level=4")

        yield Side(f"genai {precision}", "genai", _once(work / model / f"genai-{precision}", build))


def library_versions() -> dict[str, str]:
    installed = {d.name: d.version for d in metadata.distributions()}
    names = ("onnxruntime", "onnxruntime-genai", "llama_cpp_python", "apache-tvm", "numpy")
    return {name: installed[name] for name in names if name in installed}


def default_work_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mbq-versus"
