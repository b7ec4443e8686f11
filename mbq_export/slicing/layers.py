"""Linear layers that hold codes, a byte a weight, and make weights of them whenever they are needed.

The backward pass makes them anew too: autograd would otherwise keep every layer's until then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn import functional

from mbq_runtime.profile import CODE_BITS, SliceProfile

from ..blocks import replaced
from ..checkpoint import Checkpoint
from ..memory import WEIGHTS_AT_ONCE
from .reference import Sliced

CPU = torch.device("cpu")
_IN_CACHE = 1 << 18

Layer = TypeVar("Layer", bound="SlicedLinear")


def row_ranges(shape: Sequence[int], elements: int, among: slice = slice(None)) -> Iterator[slice]:
    """All rows of a matrix [N, K], or those ``among`` them, in ranges of about so many elements."""
    rows = max(1, elements // shape[1])
    first, end, _ = among.indices(shape[0])
    return (slice(start, min(start + rows, end)) for start in range(first, end, rows))


def _at_once(codes: torch.Tensor) -> int:
    """Weights to make at once: in pieces that stay in a processor's cache, and on a GPU in great ones."""
    return _IN_CACHE if codes.device.type == "cpu" else WEIGHTS_AT_ONCE


def _step(bits: int) -> float:
    """Width of a cell at ``bits``, in cells of the base quantiser."""
    return float(2.0 ** (2 - bits))


def weights(
    codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """``reference.decode_f32`` as ``dtype`` [N, K]: codes uint8 [N, K], scale and offset float32 [N, groups]."""
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for rows in row_ranges(codes.shape, _at_once(codes)):
        cells = (codes[rows] >> (CODE_BITS - bits)).view(*scale[rows].shape, -1).float()
        cells.add_(0.5).mul_((scale[rows] * _step(bits))[:, :, None]).add_(offset[rows, :, None])
        weight[rows] = cells.view(codes[rows].shape)
    return weight


def values_at(
    sliced: Sliced,
    profile: SliceProfile,
    depth: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> torch.Tensor:
    """``dtype`` [N, K] on ``device``: the weights that ``depth`` (1-based) stands for.

    In memory of torch's own: a product's last bits may hang on how its operands' addresses are aligned, and
    numpy's are as malloc has them that day.
    """
    arrays = sliced.codes, sliced.scale, sliced.offset
    codes, scale, offset = (torch.from_numpy(array).to(device) for array in arrays)
    return weights(codes, scale.float(), offset.float(), profile.depth_bits[depth - 1], dtype)


class _Product(torch.autograd.Function):
    """``x @ weights.T + bias``, with gradients for x, scale and offset."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scale: torch.Tensor,
        offset: torch.Tensor,
        codes: torch.Tensor,
        bits: int,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, scale, offset, codes)
        ctx.bits = bits
        return functional.linear(x, weights(codes, scale, offset, bits, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, offset, codes = ctx.saved_tensors
        to_x = gradient @ weights(codes, scale, offset, ctx.bits, x.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return to_x, None, None, None, None, None
        to_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        to_scale, to_offset = [], []
        for rows in row_ranges(codes.shape, _at_once(codes)):
            by_group = to_weight[rows].float().view(len(codes[rows]), scale.shape[1], -1)
            cells = (codes[rows] >> (CODE_BITS - ctx.bits)).view(by_group.shape).float()
            to_offset.append(by_group.sum(-1))
            to_scale.append(cells.add_(0.5).mul_(by_group).sum(-1) * _step(ctx.bits))
        return to_x, torch.cat(to_scale), torch.cat(to_offset), None, None, None


class SlicedLinear(torch.nn.Module):
    """A linear layer at the depth that ``bits`` names.  bias: float32 [N] on ``device``, or None."""

    def __init__(self, sliced: Sliced, bias: torch.Tensor | None, device: torch.device = CPU) -> None:
        super().__init__()
        self.codes = torch.from_numpy(sliced.codes).to(device)
        self.bias = bias
        self._scale = torch.from_numpy(sliced.scale.astype(np.float32)).to(device)
        self._offset = torch.from_numpy(sliced.offset.astype(np.float32)).to(device)
        self.bits = CODE_BITS

    @property
    def scale(self) -> torch.Tensor:
        return self._scale

    @property
    def offset(self) -> torch.Tensor:
        return self._offset

    def weight_at(self, bits: int) -> torch.Tensor:
        """float32 [N, K]."""
        return weights(self.codes, self.scale, self.offset, bits, torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        product: torch.Tensor = _Product.apply(x, self.scale, self.offset, self.codes, self.bits, bias)  # type: ignore[no-untyped-call]
        return product


@contextmanager
def sliced_layers(
    checkpoint: Checkpoint,
    slices: Mapping[str, Sliced],
    kind: Callable[[Sliced, torch.Tensor | None, torch.device], Layer],
) -> Iterator[dict[str, list[Layer]]]:
    """While the block runs, layers of ``kind`` stand in the place of all the checkpoint's; yields them by unit."""
    by_unit: dict[str, list[Layer]] = {}
    with ExitStack() as stack:
        for unit in checkpoint.decoder.units():
            sliced = slices[unit.name]
            layers = [
                kind(sliced.rows(rows), linear.bias, checkpoint.device) for linear, rows in checkpoint.layers(unit)
            ]
            by_unit[unit.name] = layers
            stack.enter_context(replaced(checkpoint, unit, list(layers)))
        yield by_unit
