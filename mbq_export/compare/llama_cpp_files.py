"""Files of llama.cpp: written from the checkpoint, quantised by the library, and read back tensor by tensor.

Only weights are compared.  A file's tensors are dequantised into the float32 model, so that activations, kernels and
tokens are the same for every side.  The files hold no tokenizer, because quantising needs none.
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


def quantise(source: Path, file_type: str, out: Path) -> None:
    """Quantise a GGUF file in a process of its own, because the library prints, and aborts when it fails.

    Args:
        source: a GGUF file of float32 tensors.
        file_type: one of ``FILE_TYPES``.
        out: the file to write.

    Raises:
        ModelError: the library fails; the message has its last line.
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
    return _ARCHITECTURES.get(model_type, model_type)
