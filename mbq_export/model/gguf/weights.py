"""Tensors of a GGUF file under the names, and in the order of rows, that transformers has them in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .config import Architecture, architecture_of
from .file import GgufFile

ROTATION_FACTORS = "rope_freqs.weight"
"""Tensor float32 [head_dim / 2]: what each rotation's frequency is divided by (Llama 3)."""

_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_BLOCK = re.compile(r"^blk\.(\d+)\.([a-z_]+)\.(weight|bias)$")


def load_weights(model: Any, file: GgufFile) -> None:
    """Fill a model's parameters, and its rotation's frequencies, from the file.

    Args:
        model: a transformers decoder made of the file's config; its parameters may be on the meta device.
        file: the open file.

    Raises:
        ModelError: a tensor is missing, or has another shape than the model.
    """
    row = architecture_of(file)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found: set[str] = set()
    for name, values in _named(file, row, model.config):
        if name not in wanted:
            continue  # ``refuse_unread`` names it: the model has no such parameter
        if values.shape != wanted[name]:
            raise file.fault(f"weight {name} has shape {list(values.shape)}; {list(wanted[name])} is needed")
        _set(model, name, torch.from_numpy(np.array(values, np.float32)))
        found.add(name)
    model.tie_weights()
    absent = sorted(wanted.keys() - found - _tied(model, wanted))
    zero = [name for name in absent if name.endswith(".bias")]
    for name in zero:  # llama.cpp's files may leave out biases that the family would have beside others
        _set(model, name, torch.zeros(wanted[name]))
    absent = [name for name in absent if name not in zero]
    if absent:
        raise file.fault(f"{len(absent)} weights are missing, the first is {absent[0]}; download the file again")
    _divide_frequencies(model, file)


def _tied(model: Any, wanted: dict[str, tuple[int, ...]]) -> set[str]:
    return {"lm_head.weight"} & wanted.keys() if model.config.tie_word_embeddings else set()


def _set(model: Any, name: str, values: torch.Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, torch.nn.Parameter(values, requires_grad=False))


def _named(file: GgufFile, row: Architecture, config: Any) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """(name in the model, values) of every tensor that has a name there."""
    for name in file.tensor_names:
        if name in _OUTSIDE:
            values = file.tensor(name)
            yield _OUTSIDE[name], values - row.norm_shift if name == "output_norm.weight" else values
        elif block := _BLOCK.match(name):
            yield from _block_tensor(file, row, config, block)


def _block_tensor(
    file: GgufFile, row: Architecture, config: Any, block: re.Match[str]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    number, part, suffix = block.groups()
    names = _IN_BLOCK | (_POST_NORMS if row.post_norms else {})
    if part not in names or int(number) >= config.num_hidden_layers:
        return
    prefix, values = f"model.layers.{number}", file.tensor(block.string)
    if part.endswith("norm"):
        values = values - np.float32(row.norm_shift)
    if row.fused and part == "ffn_up":
        yield f"{prefix}.mlp.gate_up_proj.{suffix}", values
        return
    if part == "attn_qkv" and not row.fused:
        sizes = [heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)]
        for one, rows in zip("qkv", np.split(values, np.cumsum([sizes[0], sizes[1]])), strict=True):
            yield f"{prefix}.self_attn.{one}_proj.{suffix}", _in_order(rows, one, row, config)
        return
    one = {"attn_q": "q", "attn_k": "k"}.get(part, "")
    yield f"{prefix}.{names[part]}.{suffix}", _in_order(values, one, row, config)


def _in_order(values: NDArray[np.float32], part: str, row: Architecture, config: Any) -> NDArray[np.float32]:
    """Rows of q or k in the order of transformers: llama.cpp puts the two numbers of a rotation side by side."""
    if not row.permuted or part not in ("q", "k"):
        return values
    heads = config.num_attention_heads if part == "q" else config.num_key_value_heads
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _divide_frequencies(model: Any, file: GgufFile) -> None:
    """Divide the rotations' frequencies by the factors that the file holds, where it has some.

    The factors of Llama 3 are those that its config gives as ``factor``, ``low_freq_factor`` and so on; a GGUF file
    has the result alone.
    """
    if not file.has(ROTATION_FACTORS):
        return
    factors = torch.from_numpy(file.tensor(ROTATION_FACTORS).copy())
    rotary = model.model.rotary_emb
    frequencies = getattr(rotary, "inv_freq", None)
    if frequencies is None or frequencies.shape != factors.shape:
        shape = None if frequencies is None else list(frequencies.shape)
        raise file.fault(f"tensor {ROTATION_FACTORS} has shape {list(factors.shape)}; {shape} is needed")
    for name in ("inv_freq", "original_inv_freq"):
        if hasattr(rotary, name):
            getattr(rotary, name).div_(factors)
