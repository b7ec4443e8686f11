"""Files of llama.cpp: written from the checkpoint, quantised by the library, and read back tensor by tensor.

Only weights are compared.  A file's tensors are dequantised into the float32 model, so that activations, kernels and
tokens are the same for every side.  The files hold no tokenizer, because quantising needs none.  All of them are made
with an importance matrix of the calibration text, as people make them who want the best files.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from mbq_export.model.blocks import watching_inputs
from mbq_export.model.checkpoint import Checkpoint
from mbq_runtime.errors import ModelError

FILE_TYPES = ("Q2_K", "IQ3_XXS", "Q3_K_M", "Q4_0", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
_ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3", "phi3": "phi3",
}  # fmt: skip
"""llama.cpp's name by transformers' model_type, of the families whose files can be written."""


def names(checkpoint: Checkpoint) -> dict[str, str]:
    """The name of each parameter in a GGUF file.

    Args:
        checkpoint: the model.

    Raises:
        ModelError: llama.cpp has no tensor for a parameter.
    """
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[_architecture(checkpoint)]
    table = gguf.get_tensor_name_map(arch, checkpoint.decoder.layers)
    found = {}
    for name, _ in checkpoint.model.named_parameters():  # tied weights come once
        mapped = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is None:
            raise ModelError(f"{checkpoint.source.name}: llama.cpp has no tensor for {name}; leave out llama.cpp")
        found[name] = mapped
    return found


def write_float32(checkpoint: Checkpoint, file: Path) -> None:
    """Write the model as a GGUF file of float32 tensors.

    Args:
        checkpoint: the model.
        file: where it is written.

    Raises:
        ModelError: llama.cpp does not know the model's family.
    """
    d, config = checkpoint.decoder, checkpoint.model.config
    writer = gguf.GGUFWriter(file, _architecture(checkpoint))
    writer.add_block_count(d.layers)
    writer.add_context_length(d.context_length)
    writer.add_embedding_length(d.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(d.heads)
    writer.add_head_count_kv(d.kv_heads)
    writer.add_key_length(d.head_dim)
    writer.add_value_length(d.head_dim)
    writer.add_rope_dimension_count(d.head_dim)
    writer.add_layer_norm_rms_eps(d.norm_eps)
    writer.add_vocab_size(d.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    parameters = dict(checkpoint.model.named_parameters())
    for name, mapped in names(checkpoint).items():
        writer.add_tensor(mapped, parameters[name].detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def importance(checkpoint: Checkpoint, windows: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
    """llama.cpp's importance matrix: the mean square of each input of every matrix.

    Args:
        checkpoint: the model.
        windows: int64 [windows, context] tokens to calibrate on.

    Returns:
        float32 [K] by the tensor's name in a GGUF file.
    """
    names_in_file, d = names(checkpoint), checkpoint.decoder
    modules = {name: name for name, module in checkpoint.model.named_modules() if isinstance(module, torch.nn.Linear)}
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, x: torch.Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros(())) + x.double().square().sum(0)

    with torch.no_grad(), watching_inputs(checkpoint, modules, add):
        for window in torch.from_numpy(windows):
            checkpoint.model(window[None], use_cache=False)
    head = d.head.sources[0]
    # The file has one tensor for a tied head and embedding.
    parameters = {name: f"{name}.weight" for name in sums}
    if d.tied:
        parameters[head] = "model.embed_tokens.weight"
    return {names_in_file[parameters[name]]: (total / windows.size).float().numpy() for name, total in sums.items()}


def quantise(source: Path, file_type: str, out: Path, importance: Mapping[str, NDArray[np.float32]]) -> None:
    """Quantise a GGUF file in a process of its own, because the library prints, and aborts when it fails.

    Args:
        source: a GGUF file of float32 tensors.
        file_type: one of ``FILE_TYPES``.
        out: the file to write.
        importance: see ``importance``; empty for none.

    Raises:
        ModelError: the library fails; the message has its last line.
    """
    matrix, arrays = out.with_suffix(".npz"), dict[str, Any](importance)
    np.savez(matrix, **arrays)
    command = [sys.executable, "-c", _QUANTISE, f"LLAMA_FTYPE_MOSTLY_{file_type}", str(source), str(out), str(matrix)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise ModelError(f"llama.cpp could not write {file_type}: {last[0]:.200}; leave it out with --methods")


_QUANTISE = """
import ctypes, sys, llama_cpp, numpy
file_type, source, out, matrix = sys.argv[1:]
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype = getattr(llama_cpp, file_type)
values = dict(numpy.load(matrix, allow_pickle=False))
kind = llama_cpp.llama_cpp.llama_model_imatrix_data
rows = (kind * (len(values) + 1))()  # the last one has no name and ends the list
for row, (name, value) in zip(rows, values.items()):
    row.name, row.size = name.encode(), value.size
    row.data = value.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
if values:
    parameters.imatrix = rows
sys.exit(llama_cpp.llama_model_quantize(source.encode(), out.encode(), parameters))
"""


def read_weights(file: Path, checkpoint: Checkpoint) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Decode the matrices of a GGUF file.

    Args:
        file: the GGUF file.
        checkpoint: the model that it was made from.

    Returns:
        By module: float32 weights [N, K], and the bytes that they take in the file.
    """
    modules = {mapped: name for name, mapped in names(checkpoint).items()}
    weights, sizes = {}, {}
    for tensor in gguf.GGUFReader(file).tensors:
        if len(tensor.shape) == 2:
            module = modules[tensor.name].removesuffix(".weight")
            decoded = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
            weights[module] = torch.from_numpy(decoded)
            sizes[module] = int(tensor.n_bytes)
    return weights, sizes


def _architecture(checkpoint: Checkpoint) -> str:
    model_type = checkpoint.decoder.family.model_type
    if model_type not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ModelError(
            f"llama.cpp files are written of {known}, not of {model_type}; leave those methods out with --methods"
        )
    return _ARCHITECTURES[model_type]
