"""Slice gains: what each further slice gains, by unit and token, measured on the sliced model at full depth.

For a unit with input ``x`` and weight error ``dW_k = W_E - W_k`` at depth k, the predicted loss of a token at depth k
is ``0.5 * (g . dW_k x)**2``.  This is the second-order term of the loss, with the expected outer product of gradients
``g`` in place of the Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import InitVar, dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_targets.constants import MEAN_SQUARE_EPS

from .. import processes
from ..context import Calibration
from ..format.codes import Sliced
from ..memory import ROUTER_INPUT_BYTES, router_input_bytes
from ..model.blocks import fast_autocast, fast_dtype, require_finite
from ..model.checkpoint import Checkpoint
from ..model.gradients import backpropagate_samples, lean_backward
from ..model.router_inputs import RouterInputs
from ..model.shape import Unit, stacked
from ..model.sliced_linear import SlicedLinear, sliced_layers, values_at

F32 = NDArray[np.float32]

_RARE_TOKENS = 0.01
"""Share of a unit's tokens whose predicted losses are cut to the next lower one.  A few tokens have a second-order term
without bounds, which would outweigh all others (docs/log.md)."""


@dataclass
class UnitStatistics:
    """Statistics of one unit over T calibration tokens, for E depths.

    Where the inputs of all tokens would take more than ``ROUTER_INPUT_BYTES``, T is an even sample of them.

    parameters: weights of the unit that a token reads.
    mean_square: float32 [T], of the router's input.
    change: float32 [T, E - 1], squared norm of what slice k + 1 adds to the output.
    loss: float32 [T, E], predicted loss at each depth in nats, relative to full depth, with rare outliers cut.
    inputs: float16 [T, width], the router's input over the root of mean_square; None if it is not kept.
    """

    parameters: int
    mean_square: F32
    change: F32
    loss: F32
    inputs: NDArray[np.float16] | None


@dataclass
class _Recorder:
    unit: Unit
    sliced: Sliced
    profile: SliceProfile
    keep_inputs: bool
    every: int
    router_inputs: RouterInputs
    checkpoint: Checkpoint
    tokens: InitVar[int]
    x: torch.Tensor | None = None
    grads: dict[str, torch.Tensor] = field(default_factory=dict)
    done: int = 0

    def __post_init__(self, tokens: int) -> None:
        # Allocate long-lived buffers first. Otherwise they are scattered and the heap cannot shrink.
        self.kept = {
            "mean_square": torch.empty(tokens),
            "change": torch.empty(tokens, self.profile.depths - 1),
            "loss": torch.empty(tokens, self.profile.depths),
        }
        if self.keep_inputs:
            # float16 holds the inputs because they are scaled to unit mean square.
            width = self.checkpoint.decoder.router_widths()[self.unit.name]
            self.kept["inputs"] = torch.empty(tokens, width, dtype=torch.float16)

    def hook(self, name: str) -> Callable[..., None]:
        def forward(_: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            self.x = args[0].detach().reshape(-1, args[0].shape[-1])
            output.register_hook(lambda g: self.grads.__setitem__(name, g.reshape(-1, g.shape[-1])))

        return forward

    def close_window(self) -> None:
        assert self.x is not None
        for x in self._inputs():
            require_finite(self.unit.name, x)
        seen = self.router_inputs.of(self.unit, self.x)[:: self.every].float()
        mean_square = (seen**2).mean(1) + MEAN_SQUARE_EPS
        rows = slice(self.done, self.done + len(seen))
        self.kept["mean_square"][rows] = mean_square
        gains = torch.zeros(len(seen), self.profile.depths, device=seen.device)
        self._add_changes(self.kept["change"][rows], gains)
        # What all slices after a depth change.
        self.kept["loss"][rows] = 0.5 * gains.flip(1).cumsum(1).flip(1).cpu() ** 2
        if self.keep_inputs:
            self.kept["inputs"][rows] = (seen / mean_square.sqrt()[:, None]).half()
        self.done = rows.stop
        self.x = None
        self.grads.clear()

    def _inputs(self) -> list[torch.Tensor]:
        """The inputs of the window."""
        assert self.x is not None
        return [self.x]

    def _add_changes(self, squared: torch.Tensor, gains: torch.Tensor) -> None:
        """Set the squared norm [T, E - 1] of what each slice adds to the output, and its product with g [T, E]."""
        assert self.x is not None
        g = torch.cat([self.grads[name][:: self.every] for name in self.unit.sources], dim=1)
        for slice_, change in enumerate(self._changes(self.x[:: self.every], self.sliced)):
            squared[:, slice_] = (change**2).sum(1)
            gains[:, slice_] = (g * change).sum(1)

    def _changes(self, x: torch.Tensor, sliced: Sliced) -> Iterator[torch.Tensor]:
        """What each slice after the first adds to the output, float32 [tokens, N].

        Weights are rebuilt each time: to keep them would take E times the model's memory.  A product of differences
        loses nothing by fewer digits, as a difference of products would.
        """
        dtype = fast_dtype(x.device)
        x, below = x.to(dtype), values_at(sliced, self.profile, 1, device=x.device)
        for depth in range(2, self.profile.depths + 1):
            deeper = values_at(sliced, self.profile, depth, device=x.device)
            yield (x @ below.neg_().add_(deeper).to(dtype).T).float()
            below = deeper

    def result(self) -> UnitStatistics:
        of_all = processes.gathered([self.kept])
        joined = {
            key: (torch.cat([of_each[key] for of_each in of_all]) if len(of_all) > 1 else of_own).numpy()
            for key, of_own in self.kept.items()
        }
        loss = without_outliers(joined["loss"])
        return UnitStatistics(
            self.unit.read_of(self.sliced.codes.size),
            joined["mean_square"],
            joined["change"],
            loss,
            joined.get("inputs"),
        )


class _ExpertsRecorder(_Recorder):
    """Of experts: what a slice changes for a token is the sum over the experts that it takes."""

    def __post_init__(self, tokens: int) -> None:
        super().__post_init__(tokens)
        self.parts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def hook(self, name: str) -> Callable[..., None]:
        def forward(_: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            tokens = self.checkpoint.tokens_of(name)
            assert tokens is not None
            self.x = args[0].detach()
            self.parts[name] = self.x, tokens
            output.register_hook(lambda g: self.grads.__setitem__(name, g))

        return forward

    def _inputs(self) -> list[torch.Tensor]:
        return [x for x, _ in self.parts.values()]

    def _add_changes(self, squared: torch.Tensor, gains: torch.Tensor) -> None:
        squared.zero_()
        places = dict(zip(self.unit.sources, stacked(*self._rows_each()), strict=True))
        for name, (x, tokens) in self.parts.items():
            taken = tokens % self.every == 0
            at = tokens[taken] // self.every
            for slice_, change in enumerate(self._changes(x[taken], self.sliced.rows(places[name]))):
                squared[:, slice_].index_add_(0, at.cpu(), (change**2).sum(1).cpu())
                gains[:, slice_].index_add_(0, at, (self.grads[name][taken] * change).sum(1))
        self.parts.clear()

    def _rows_each(self) -> list[int]:
        return [len(self.sliced.codes) // len(self.unit.sources)] * len(self.unit.sources)


def without_outliers(loss: F32) -> F32:
    """Cut the highest ``_RARE_TOKENS`` of every column to its quantile there (winsorisation).

    Args:
        loss: float32 [T, E].

    Returns:
        float32 [T, E].
    """
    return np.minimum(loss, np.quantile(loss, 1 - _RARE_TOKENS, axis=0).astype(np.float32))


def measure_gains(
    calibration: Calibration,
    slices: dict[str, Sliced],
    windows: NDArray[np.int64],
    *,
    keep_inputs: bool = False,
    stage: str = "measuring slice gains",
) -> dict[str, UnitStatistics]:
    """Run the sliced model forward and backward at full depth, and measure what each slice gains.

    The embedding and the norms are the checkpoint's.

    Args:
        calibration: the context, with the checkpoint.
        slices: of every unit, by unit name.
        windows: int64 [windows, context] tokens.
        keep_inputs: whether to keep the routers' inputs.
        stage: name of the stage.

    Returns:
        Statistics by unit name.

    Raises:
        ModelError: an activation is not finite.
    """
    progress, checkpoint = calibration.stage(stage), calibration.checkpoint
    generator = torch.Generator().manual_seed(calibration.seed + processes.index())
    own = windows[processes.share(len(windows))]
    router_inputs = RouterInputs(checkpoint)
    every = -(-router_input_bytes(checkpoint.decoder, windows.size) // ROUTER_INPUT_BYTES) if keep_inputs else 1
    tokens = len(own) * -(-windows.shape[1] // every)
    recorders = [
        (_Recorder if unit.experts is None else _ExpertsRecorder)(
            unit, slices[unit.name], calibration.profile, keep_inputs, every, router_inputs, checkpoint, tokens
        )
        for unit in checkpoint.decoder.units()
    ]
    with ExitStack() as hooks, router_inputs.recording():
        hooks.enter_context(lean_backward(checkpoint))
        layers = hooks.enter_context(sliced_layers(checkpoint, slices, calibration.profile, SlicedLinear))
        for recorder in recorders:
            for name, layer in zip(recorder.unit.sources, layers[recorder.unit.name], strict=True):
                hooks.enter_context(layer.register_forward_hook(recorder.hook(name)))
        for i, window in enumerate(own):
            with fast_autocast(checkpoint.device):
                backpropagate_samples(checkpoint, window, generator)
            with torch.no_grad():
                for recorder in recorders:
                    recorder.close_window()
            progress(i + 1, len(own))
    return {recorder.unit.name: recorder.result() for recorder in recorders}
