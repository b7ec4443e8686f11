"""Linear layers that hold codes, one byte a weight, and compute their weights at each call.

The backward pass computes the weights again.  Otherwise autograd would keep the weights of every layer.  Torch's
operations do the work on any device.  On the processor ``sliced_linear.c`` does the same faster.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.nn import functional

from mbq_runtime.bundle.slice_profile import CODE_BITS, SliceProfile

from ..compiled import compiled
from ..format.codes import Sliced
from ..memory import WEIGHTS_AT_ONCE
from .blocks import replaced
from .checkpoint import Checkpoint

CPU = torch.device("cpu")
_IN_CACHE = 1 << 18
_SOURCE = Path(__file__).with_suffix(".c")
_IN_C = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""The numbers that ``sliced_linear.c`` has functions for."""

Layer = TypeVar("Layer", bound="SlicedLinear")


def row_ranges(shape: Sequence[int], elements: int, among: slice = slice(None)) -> Iterator[slice]:
    """Split the rows of a matrix into ranges.

    Args:
        shape: [N, K] of the matrix.
        elements: about how many elements a range has.
        among: which rows to split; all of them by default.
    """
    rows = max(1, elements // shape[1])
    first, end, _ = among.indices(shape[0])
    return (slice(start, min(start + rows, end)) for start in range(first, end, rows))


def _at_once(codes: torch.Tensor) -> int:
    """How many weights to compute at once: few on a processor, so that they stay in its cache, many on a GPU."""
    return _IN_CACHE if codes.device.type == "cpu" else WEIGHTS_AT_ONCE


class _Depth(ctypes.Structure):
    """How ``sliced_linear.c`` makes a level of a code at a depth; ``format.codes.levels`` defines it."""

    _fields_ = (
        ("high", ctypes.c_int32),
        ("stride", ctypes.c_int32),
        ("mask", ctypes.c_int32),
        ("low", ctypes.c_int32),
        ("middle", ctypes.c_float),
        ("step", ctypes.c_float),
    )

    @classmethod
    def of(cls, profile: SliceProfile, bits: int) -> _Depth:
        middle, step, low = profile.middle(bits), profile.step(bits), CODE_BITS - bits
        if bits <= profile.coarse_bits:
            return cls(low, 1, 0, 0, middle, step)
        fine_bits = CODE_BITS - profile.coarse_bits
        return cls(fine_bits, profile.stride(bits), (1 << fine_bits) - 1, low, middle, step)


def _sizes(codes: torch.Tensor, of_groups: torch.Tensor) -> tuple[int, int]:
    """Columns of a matrix, and those of a group."""
    return codes.shape[1], codes.shape[1] // of_groups.shape[1]


def _levels(codes: torch.Tensor, profile: SliceProfile, bits: int) -> torch.Tensor:
    """As ``format.codes.levels``."""
    if bits <= profile.coarse_bits:
        return codes >> (CODE_BITS - bits)
    fine_bits = CODE_BITS - profile.coarse_bits
    fine = (codes & ((1 << fine_bits) - 1)) >> (CODE_BITS - bits)
    return (codes >> fine_bits) * profile.stride(bits) + fine


def weights(
    codes: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    *,
    profile: SliceProfile,
    bits: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Weights at a depth, as ``format.codes.decode_f32`` defines them.

    Args:
        codes: uint8 [N, K].
        scale: float32 [N, groups].
        offset: float32 [N, groups].
        profile: the bits of each slice.
        bits: bits per weight of the depth.
        dtype: of the result.

    Returns:
        [N, K] on the device of the codes.
    """
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    in_c = compiled(_SOURCE, codes.device) if dtype in _IN_C else None
    if in_c is not None:
        sizes, own = _sizes(codes, scale), (codes.contiguous(), scale.contiguous(), offset.contiguous())
        in_c(f"mbq_weights_{_IN_C[dtype]}", len(codes), _Depth.of(profile, bits), *sizes, *own, weight)
        return weight
    for rows in row_ranges(codes.shape, _at_once(codes)):
        cells = _levels(codes[rows], profile, bits).view(*scale[rows].shape, -1).float()
        cells.add_(profile.middle(bits)).mul_((scale[rows] * profile.step(bits))[:, :, None]).add_(
            offset[rows, :, None]
        )
        weight[rows] = cells.view(codes[rows].shape)
    return weight


def values_at(
    sliced: Sliced,
    profile: SliceProfile,
    depth: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> torch.Tensor:
    """Weights of a matrix at a depth.

    torch allocates the result.  The last bits of a product can depend on the alignment of its operands, and numpy's
    alignment varies from run to run.

    Args:
        sliced: a matrix [N, K].
        profile: the bits of each slice.
        depth: 1-based.
        dtype: of the result.
        device: of the result.

    Returns:
        [N, K].
    """
    arrays = sliced.codes, sliced.scale_at(depth), sliced.offset_at(depth)
    codes, scale, offset = (torch.from_numpy(array).to(device) for array in arrays)
    return weights(codes, scale, offset, profile=profile, bits=profile.depth_bits[depth - 1], dtype=dtype)


Bits = int | torch.Tensor
"""Bits per weight: one number for all tokens, or int64 [tokens] on the processor."""


def _by_bits(bits: Bits) -> Iterator[tuple[int, slice | torch.Tensor]]:
    """The bits that occur, and the tokens that have them."""
    if isinstance(bits, int):
        yield bits, slice(None)
        return
    occurring = bits.unique().tolist()
    for each in occurring:
        yield each, slice(None) if len(occurring) == 1 else (bits == each).nonzero()[:, 0]


class _Product(torch.autograd.Function):
    """``x @ weights.T + bias`` for x [..., tokens, K], with gradients for x, scale, offset and gain."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scale: torch.Tensor,
        offset: torch.Tensor,
        gain: torch.Tensor,
        codes: torch.Tensor,
        profile: SliceProfile,
        bits: Bits,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.profile, ctx.bits, ctx.bias = profile, bits, bias
        tokens = x.flatten(0, -2)
        output = x.new_empty(len(tokens), len(codes))
        for at, rows in _by_bits(bits):
            factor = _of_depth(gain, profile, at)
            weight = weights(codes, scale * factor, offset * factor, profile=profile, bits=at, dtype=x.dtype)
            output[rows] = functional.linear(tokens[rows], weight, bias)
        ctx.save_for_backward(x, scale, offset, gain, codes, output)
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, offset, gain, codes, output = ctx.saved_tensors
        tokens, from_tokens = x.flatten(0, -2), gradient.flatten(0, -2)
        to_x = torch.empty_like(tokens) if ctx.needs_input_grad[0] else None
        to_scale, to_offset = (torch.zeros_like(scale) if ctx.needs_input_grad[1] else None for _ in range(2))
        to_gain = torch.zeros_like(gain) if ctx.needs_input_grad[3] else None
        for at, rows in _by_bits(ctx.bits):
            of_rows, factor = from_tokens[rows], _of_depth(gain, ctx.profile, at)
            if to_x is not None:
                own = scale * factor, offset * factor
                to_x[rows] = of_rows @ weights(codes, *own, profile=ctx.profile, bits=at, dtype=x.dtype)
            if to_scale is not None and to_offset is not None:
                by_scale, by_offset = torch.zeros_like(scale), torch.zeros_like(offset)
                _add_gradients(by_scale, by_offset, of_rows.T @ tokens[rows], codes, ctx.profile, at)
                to_scale += by_scale * factor
                to_offset += by_offset * factor
            if to_gain is not None:
                # It needs no gradient of the weights.
                plain = output[rows] if ctx.bias is None else output[rows] - ctx.bias
                _of_depth(to_gain, ctx.profile, at)[:, 0] += (of_rows.float() * plain.float()).sum(0) / factor[:, 0]
        of_x = None if to_x is None else to_x.view(x.shape)
        return of_x, to_scale, to_offset, to_gain, None, None, None, None


def _of_depth(gain: torch.Tensor, profile: SliceProfile, bits: int) -> torch.Tensor:
    """The gains [N, 1] of a depth, of float32 [N, E].  It is a view."""
    depth = profile.depth_bits.index(bits)
    return gain[:, depth : depth + 1]


def _add_gradients(
    to_scale: torch.Tensor,
    to_offset: torch.Tensor,
    to_weight: torch.Tensor,
    codes: torch.Tensor,
    profile: SliceProfile,
    bits: int,
) -> None:
    """Add to the gradients of scale and offset, float32 [N, groups], what the weights' gradient [N, K] gives."""
    in_c = compiled(_SOURCE, codes.device) if to_weight.dtype in _IN_C else None
    if in_c is not None:
        sizes, own = _sizes(codes, to_scale), (codes.contiguous(), to_weight.contiguous())
        name = f"mbq_add_gradients_{_IN_C[to_weight.dtype]}"
        in_c(name, len(codes), _Depth.of(profile, bits), *sizes, *own, to_scale, to_offset)
        return
    for rows in row_ranges(codes.shape, _at_once(codes)):
        by_group = to_weight[rows].float().view(*to_scale[rows].shape, -1)
        cells = _levels(codes[rows], profile, bits).view(by_group.shape).float()
        to_offset[rows] += by_group.sum(-1)
        to_scale[rows] += cells.add_(profile.middle(bits)).mul_(by_group).sum(-1) * profile.step(bits)


class SlicedLinear(torch.nn.Module):
    """A linear layer whose tokens use the depths that ``bits`` gives.

    codes: uint8 [N, K] on the device.
    bias: float32 [N] or None.
    bits: bits per weight of the next call; all bits at first.

    Args:
        sliced: a matrix [N, K].
        profile: the bits of each slice.
        bias: float32 [N] on ``device``, or None.
        device: where the layer computes.
    """

    def __init__(
        self, sliced: Sliced, profile: SliceProfile, bias: torch.Tensor | None, device: torch.device = CPU
    ) -> None:
        super().__init__()
        self._profile = profile
        self.codes = torch.from_numpy(sliced.codes).to(device)
        self.bias = bias
        self._scale = torch.from_numpy(sliced.scale).to(device)
        self._offset = torch.from_numpy(sliced.offset).to(device)
        self._gain = torch.from_numpy(sliced.gain).to(device)
        self.bits: Bits = CODE_BITS

    @property
    def scale(self) -> torch.Tensor:
        """float32 [N, groups], at the last depth."""
        return self._scale

    @property
    def offset(self) -> torch.Tensor:
        """float32 [N, groups], at the last depth."""
        return self._offset

    @property
    def gain(self) -> torch.Tensor:
        """float32 [N, E]: what each depth multiplies scales and offsets of a row by."""
        return self._gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output, [..., tokens, N].

        Args:
            x: [..., tokens, K].
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        product: torch.Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x, self.scale, self.offset, self.gain, self.codes, self._profile, self.bits, bias
        )
        return product


@contextmanager
def sliced_layers(
    checkpoint: Checkpoint,
    slices: Mapping[str, Sliced],
    profile: SliceProfile,
    kind: Callable[[Sliced, SliceProfile, torch.Tensor | None, torch.device], Layer],
) -> Iterator[dict[str, list[Layer]]]:
    """Replace all routed layers of the model while the block runs.

    Args:
        checkpoint: the model.
        slices: by unit name.
        profile: the bits of each slice.
        kind: makes a layer of its slices, the profile, its bias and the device.

    Yields:
        The new layers by unit name.
    """
    by_unit: dict[str, list[Layer]] = {}
    with ExitStack() as stack:
        for unit in checkpoint.decoder.units():
            sliced = slices[unit.name]
            layers = [
                kind(sliced.rows(rows), profile, linear.bias, checkpoint.device)
                for linear, rows in checkpoint.layers(unit)
            ]
            by_unit[unit.name] = layers
            stack.enter_context(replaced(checkpoint, unit, list(layers)))
        yield by_unit
