"""Linear layers that hold their weights at every depth: each token uses those of its own depth."""

from __future__ import annotations

import torch
from torch.nn import functional

from mbq_runtime.bundle.slice_profile import SliceProfile

from ..format.codes import Sliced
from .checkpoint import Checkpoint
from .router_inputs import Depths, RouterInputs, UnitDepths
from .shape import Unit
from .sliced_linear import SlicedLinear, values_at


class RoutedUnit:
    """The layers of one unit, with the router that they share.

    unit: the unit.
    depths: chooses the depth of each token.
    parameters: weights of the unit that a token reads.
    layers: modules that replace the unit's layers, in its order.

    Args:
        checkpoint: the model.
        unit: the unit.
        sliced: its slices, [N, K].
        profile: the bits of each slice.
        inputs: the router inputs of the model.
        dtype: of the weights and products.
        keep_weights: whether the weights of all depths are kept, which takes less time.  Otherwise each call computes
            those of one depth at a time, in float32.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        unit: Unit,
        sliced: Sliced,
        profile: SliceProfile,
        inputs: RouterInputs,
        *,
        dtype: torch.dtype,
        keep_weights: bool = True,
    ) -> None:
        self.unit, self.depths = unit, UnitDepths(unit, inputs, checkpoint)
        self.parameters = unit.read_of(sliced.codes.size)
        self._bits = torch.tensor([0.0, *profile.depth_bits], dtype=torch.float64)
        layers = zip(unit.sources, checkpoint.layers(unit), strict=True)
        self.layers: list[torch.nn.Module]
        if not keep_weights:
            self.layers = [
                _CodedLayer(sliced.rows(rows), profile, linear.bias, checkpoint.device, self.depths.of_layer(name))
                for name, (linear, rows) in layers
            ]
            return
        depths = range(1, profile.depths + 1)
        whole = [values_at(sliced, profile, depth, dtype, checkpoint.device) for depth in depths]
        self.layers = [
            _RoutedLayer([weight[rows] for weight in whole], linear.bias, self.depths.of_layer(name))
            for name, (linear, rows) in layers
        ]

    @property
    def used_bits(self) -> float:
        """Bits per weight of the last input, summed over its tokens."""
        return float(self._bits[self.depths.of_last].sum())


class _CodedLayer(SlicedLinear):
    def __init__(
        self,
        sliced: Sliced,
        profile: SliceProfile,
        bias: torch.Tensor | None,
        device: torch.device,
        depths: Depths,
    ) -> None:
        super().__init__(sliced, profile, bias, device)
        self._depths, self._depth_bits = depths, torch.tensor([0, *profile.depth_bits])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., tokens, K] -> [..., tokens, N]."""
        self.bits = self._depth_bits[self._depths(x)]
        return super().forward(x)


class _RoutedLayer(torch.nn.Module):
    """weights: by depth, each [N, K]."""

    def __init__(self, weights: list[torch.Tensor], bias: torch.Tensor | None, depths: Depths) -> None:
        super().__init__()
        self.weights, self.bias, self.depths = weights, bias, depths

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., tokens, K] -> [..., tokens, N]."""
        depth = self.depths(x).to(x.device)
        # Rounded before its rows are taken, and not once for each depth.
        flat = x.reshape(-1, x.shape[-1]).to(self.weights[0].dtype)
        if len(depth) and bool((depth == depth[0]).all()):
            return functional.linear(flat, self.weights[int(depth[0]) - 1], self.bias).reshape(*x.shape[:-1], -1)
        output = self.weights[0].new_empty(len(flat), len(self.weights[0]))
        for at, weight in enumerate(self.weights, 1):
            rows = (depth == at).nonzero()[:, 0]
            if len(rows):
                output.index_copy_(0, rows, functional.linear(flat.index_select(0, rows), weight, self.bias))
        return output.reshape(*x.shape[:-1], -1)
