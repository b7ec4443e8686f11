"""Weights stored in 8-bit floats with scales, turned into float32 before the model is made.

The scale of a weight lies beside it under one of the names of ``_SCALES``: one number for the whole matrix, one for
each row, or one for each block of rows and columns (``weight_block_size``, 128 x 128 in published checkpoints).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mbq_runtime.errors import ModelError

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = ("weight_scale_inv", "weight_scale")
"""Both are what the stored numbers are multiplied by."""
_ACTIVATIONS = ("input_scale", "activation_scale", "k_scale", "v_scale", "output_scale")
"""Scales of activations: they choose a run-time rounding that bundles do not use."""


def float32_weights(files: list[Path], name: str) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint in float32, without the scales.

    Args:
        files: its safetensors files.
        name: the model's name, for errors.

    Raises:
        ModelError: a float8 weight has no scale, or one of an unknown shape.
    """
    from safetensors.torch import load_file

    stored: dict[str, torch.Tensor] = {}
    for file in files:
        stored |= load_file(file)
    weights: dict[str, torch.Tensor] = {}
    for key, tensor in stored.items():
        owner, _, attribute = key.rpartition(".")
        if attribute in (*_SCALES, *_ACTIVATIONS):
            continue
        if tensor.dtype not in FLOAT8:
            weights[key] = tensor.float()
            continue
        scale = next((stored[f"{owner}.{one}"] for one in _SCALES if f"{owner}.{one}" in stored), None)
        if scale is None:
            raise ModelError(
                f"{name}: weight {key} is {tensor.dtype} without a {_SCALES[1]} beside it; give the original model"
            )
        weights[key] = _scaled(tensor.float(), scale.float(), f"{name}: weight {key}")
    return weights


def _scaled(weight: torch.Tensor, scale: torch.Tensor, where: str) -> torch.Tensor:
    """weight: float32 [N, K]; scale: one number, [N], [N, 1], or [N / rows, K / columns] rounded up."""
    if scale.numel() == 1:
        return weight * scale.reshape(())
    if scale.ndim == 1 and len(scale) == len(weight):
        scale = scale[:, None]
    if scale.ndim == 2 and weight.ndim == 2:
        if scale.shape == (len(weight), 1):
            return weight * scale
        rows, columns = (_block(size, count) for size, count in zip(weight.shape, scale.shape, strict=True))
        if rows and columns:
            wide = scale.repeat_interleave(rows, 0)[: len(weight)].repeat_interleave(columns, 1)
            return weight * wide[:, : weight.shape[1]]
    raise ModelError(f"{where} has a scale of shape {list(scale.shape)} for {list(weight.shape)}; give the original")


def _block(size: int, count: int) -> int:
    """The power of two that cuts ``size`` into ``count`` blocks, the last one perhaps short; 0 for none."""
    fits = [1 << bits for bits in range(20) if -(-size // (1 << bits)) == count]
    return next((block for block in fits if block == 128), fits[0] if fits else 0)


def is_float8(quantization: dict[str, Any]) -> bool:
    """Whether a ``quantization_config`` says float8 weights with scales, which are read.

    Args:
        quantization: the config's entry.
    """
    method = str(quantization.get("quant_method", "")).lower()
    algorithm = str(quantization.get("quant_algo", quantization.get("format", ""))).lower()
    return method == "fp8" or (method == "modelopt" and algorithm == "fp8") or algorithm == "float-quantized"
