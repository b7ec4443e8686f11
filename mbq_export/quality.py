"""What a sliced and routed model is worth at a budget, measured block by block on held-back text.

The same arithmetic as the bundle's but for the rounding of activations, which costs less than a
thousandth: ``mbq perplexity`` on the bundle gives the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from mbq_runtime.bundle.slice_profile import SliceProfile

from . import processes
from .format.codes import Sliced
from .model.blocks import Blocks, Hidden, autocast, replaced
from .model.checkpoint import Checkpoint
from .model.families import Unit
from .model.router_inputs import Depths, RouterInputs, UnitDepths
from .model.sliced_linear import values_at

Case = Mapping[str, Depths]
"""One way to route a model: by unit name."""


@dataclass(frozen=True)
class Measured:
    """nll: float64 [windows], mean nats a token of each window; avg_bits_used: over tokens and parameters."""

    nll: NDArray[np.float64]
    avg_bits_used: float

    @property
    def perplexity(self) -> float:
        return math.exp(float(self.nll.mean()))


class _Routed(torch.nn.Module):
    """A linear layer whose tokens each use the weights of their own depth, which the unit says."""

    def __init__(self, weights: list[torch.Tensor], bias: torch.Tensor | None, unit: _RoutedUnit) -> None:
        super().__init__()
        self.weights, self.bias, self.unit = weights, bias, unit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        depth = self.unit.depths.of(x).to(x.device)
        flat = x.reshape(-1, x.shape[-1])
        output = self.weights[0].new_empty(len(flat), len(self.weights[0]))
        for at, weight in enumerate(self.weights, 1):
            rows = depth == at
            if rows.any():
                output[rows] = functional.linear(flat[rows], weight, self.bias)
        return output.reshape(*x.shape[:-1], -1)


class _RoutedUnit:
    """The layers that share one router."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        unit: Unit,
        sliced: Sliced,
        profile: SliceProfile,
        inputs: RouterInputs,
        dtype: torch.dtype,
    ) -> None:
        self.unit, self.depths = unit, UnitDepths(unit, inputs)
        self.parameters = sliced.codes.size
        self.bits = torch.tensor([0.0, *profile.depth_bits], dtype=torch.float64)
        depths = range(1, profile.depths + 1)
        whole = [values_at(sliced, profile, depth, dtype, checkpoint.device) for depth in depths]
        self.layers: list[torch.nn.Module] = [
            _Routed([weight[rows] for weight in whole], linear.bias, self) for linear, rows in checkpoint.layers(unit)
        ]

    @property
    def used_bits(self) -> float:
        """Of the last input, summed over its tokens."""
        return float(self.bits[self.depths.of_last].sum())


def measure(
    checkpoint: Checkpoint,
    slices: Mapping[str, Sliced],
    profile: SliceProfile,
    windows: NDArray[np.int64],
    cases: Sequence[Case],
    progress: Callable[[int, int], None] = lambda done, total: None,
    dtype: torch.dtype = torch.float32,
) -> list[Measured]:
    """Every case on int64 [windows, context] tokens, all of them going through a block together.

    The checkpoint's embedding and norms count as they are; its linear layers stand aside, for ones that multiply
    in ``dtype``.
    """
    d = checkpoint.decoder
    blocks, inputs = Blocks(checkpoint, windows.shape[1]), RouterInputs(checkpoint)
    own = windows[processes.share(len(windows))]
    start = blocks.embed(own)
    hidden: list[list[Hidden]] = [list(start) for _ in cases]
    used = np.zeros(len(cases))
    parameters = 0

    def routed(unit: Unit) -> _RoutedUnit:
        return _RoutedUnit(checkpoint, unit, slices[unit.name], profile, inputs, dtype)

    def count(case: int, units: Sequence[_RoutedUnit]) -> None:
        used[case] += sum(unit.used_bits * unit.parameters for unit in units)

    with autocast(dtype, checkpoint.device), inputs.recording():
        for layer in range(d.layers):
            units = [routed(unit) for unit in d.layer_units(layer).values()]
            parameters += sum(unit.parameters for unit in units)
            with ExitStack() as stack:
                for unit in units:
                    stack.enter_context(replaced(checkpoint, unit.unit, unit.layers))
                for i, case in enumerate(cases):
                    for unit in units:
                        unit.depths.use(case[unit.unit.name])
                    for j, window in enumerate(hidden[i]):
                        hidden[i][j] = blocks.run(layer, window)
                        count(i, units)
            for unit in units:
                # A unit and its layers refer to each other: without this their weights would wait for a collection.
                unit.layers.clear()
            progress(layer + 1, d.layers + 1)
        head = routed(d.head)
        parameters += head.parameters
        nll = np.zeros((len(own), len(cases)))
        for i, case in enumerate(cases):
            head.depths.use(case[d.head.name])
            for j, (window, tokens) in enumerate(zip(hidden[i], own, strict=True)):
                logits = head.layers[0](blocks.final(window))
                count(i, [head])
                nll[j, i] = float(functional.cross_entropy(logits[:-1].float(), checkpoint.on_device(tokens[1:])))
    progress(d.layers + 1, d.layers + 1)
    used = processes.summed(torch.from_numpy(used)).numpy() / (parameters * windows.size)
    of_cases = np.array(processes.gathered(nll)).T
    return [Measured(of_case, float(bits)) for of_case, bits in zip(of_cases, used, strict=True)]


def reference(checkpoint: Checkpoint, windows: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64 [windows]: mean nats a token of the checkpoint's model as it is."""
    nll = []
    with torch.no_grad():
        for window in checkpoint.on_device(windows[processes.share(len(windows))]):
            logits = checkpoint.model(window[None], use_cache=False).logits[0]
            nll.append(float(functional.cross_entropy(logits[:-1].float(), window[1:])))
    return np.array(processes.gathered(nll))
