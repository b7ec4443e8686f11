"""Files of llama.cpp: written from the checkpoint, quantised by the library, and read back tensor by tensor.

Only weights are compared: a file's tensors are dequantised into the float32 model, so that activations, kernels
and tokens are the same for every side.  The files hold no tokenizer; quantising needs none.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import torch

from mbq_export.model.checkpoint import Checkpoint
from mbq_runtime.errors import ModelError

FILE_TYPES = ("Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
_ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}
"""llama.cpp's name where it is not transformers' model_type."""


def names(checkpoint: Checkpoint) -> dict[str, str]:
    """Each of the checkpoint's parameters to its tensor in a file."""
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
    """The checkpoint as a GGUF file of float32 tensors.  Raises ModelError for a family that llama.cpp lacks."""
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


def quantise(source: Path, file_type: str, out: Path) -> None:
    """Write ``out`` as llama.cpp's ``file_type``.  Raises ModelError with what the library said.

    In a process of its own: the library prints a line for each tensor, and what it cannot do it ends with an abort.
    """
    command = [sys.executable, "-c", _QUANTISE, f"LLAMA_FTYPE_MOSTLY_{file_type}", str(source), str(out)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise ModelError(f"llama.cpp could not write {file_type}: {last[0]:.200}; leave it out with --methods")


_QUANTISE = """
import sys, llama_cpp
file_type, source, out = sys.argv[1:]
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype = getattr(llama_cpp, file_type)
sys.exit(llama_cpp.llama_model_quantize(source.encode(), out.encode(), parameters))
"""


def read_weights(file: Path, checkpoint: Checkpoint) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Of each module with a matrix: float32 [N, K] as the file decodes it, and the bytes it takes there."""
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
    return _ARCHITECTURES.get(model_type, model_type)
