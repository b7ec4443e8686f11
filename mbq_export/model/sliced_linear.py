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

from mbq_runtime.bundle.slice_profile import CODE_BITS, SliceProfile

from ..format.codes import Sliced
from ..memory import WEIGHTS_AT_ONCE
from .blocks import replaced
from .checkpoint import Checkpoint

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
    """``format.codes.decode_f32`` as ``dtype`` [N, K]: codes uint8 [N, K], scale and offset float32 [N, groups]."""
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


Bits = int | torch.Tensor
"""Of all tokens, or int64 [tokens] on the processor: of each."""


def _by_bits(bits: Bits) -> Iterator[tuple[int, slice | torch.Tensor]]:
    """The bits that occur, and which tokens have them."""
    if isinstance(bits, int):
        yield bits, slice(None)
        return
    occurring = bits.unique().tolist()
    for each in occurring:
        yield each, slice(None) if len(occurring) == 1 else (bits == each).nonzero()[:, 0]


class _Product(torch.autograd.Function):
    """``x @ weights.T + bias`` for x [..., tokens, K], with gradients for x, scale and offset."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scale: torch.Tensor,
        offset: torch.Tensor,
        codes: torch.Tensor,
        bits: Bits,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, scale, offset, codes)
        ctx.bits = bits
        tokens = x.flatten(0, -2)
        output = x.new_empty(len(tokens), len(codes))
        for at, rows in _by_bits(bits):
            output[rows] = functional.linear(tokens[rows], weights(codes, scale, offset, at, x.dtype), bias)
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, offset, codes = ctx.saved_tensors
        tokens, from_tokens = x.flatten(0, -2), gradient.flatten(0, -2)
        to_x = torch.empty_like(tokens) if ctx.needs_input_grad[0] else None
        to_scale, to_offset = (torch.zeros_like(scale) if ctx.needs_input_grad[1] else None for _ in range(2))
        for at, rows in _by_bits(ctx.bits):
            of_rows = from_tokens[rows]
            if to_x is not None:
                to_x[rows] = of_rows @ weights(codes, scale, offset, at, x.dtype)
            if to_scale is not None and to_offset is not None:
                _add_gradients(to_scale, to_offset, of_rows.T @ tokens[rows], codes, at)
        return None if to_x is None else to_x.view(x.shape), to_scale, to_offset, None, None, None


def _add_gradients(
    to_scale: torch.Tensor, to_offset: torch.Tensor, to_weight: torch.Tensor, codes: torch.Tensor, bits: int
) -> None:
    """Onto gradients of scale and offset, float32 [N, groups], that of ``weights`` at ``bits``, [N, K]."""
    for rows in row_ranges(codes.shape, _at_once(codes)):
        by_group = to_weight[rows].float().view(*to_scale[rows].shape, -1)
        cells = (codes[rows] >> (CODE_BITS - bits)).view(by_group.shape).float()
        to_offset[rows] += by_group.sum(-1)
        to_scale[rows] += cells.add_(0.5).mul_(by_group).sum(-1) * _step(bits)


class SlicedLinear(torch.nn.Module):
    """A linear layer at the depths that ``bits`` names.  bias: float32 [N] on ``device``, or None."""

    def __init__(self, sliced: Sliced, bias: torch.Tensor | None, device: torch.device = CPU) -> None:
        super().__init__()
        self.codes = torch.from_numpy(sliced.codes).to(device)
        self.bias = bias
        self._scale = torch.from_numpy(sliced.scale.astype(np.float32)).to(device)
        self._offset = torch.from_numpy(sliced.offset.astype(np.float32)).to(device)
        self.bits: Bits = CODE_BITS

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
