"""Perplexity of a sliced and routed model at a budget, measured block by block on held-back text.

It computes as the bundle does, but does not round activations, which costs less than a thousandth.  So
``mbq perplexity`` on the bundle gives the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from . import processes
from .context import Calibration
from .format.codes import Sliced
from .model.blocks import Blocks, Hidden, autocast, replaced
from .model.checkpoint import Checkpoint
from .model.families import Unit
from .model.routed_linear import RoutedUnit
from .model.router_inputs import ModelDepths, RouterInputs


@dataclass(frozen=True)
class Measured:
    """Loss and bits of one way to route a model.

    nll: float64 [windows], mean nats a token of each window.
    avg_bits_used: average bits per weight over tokens and parameters.
    """

    nll: NDArray[np.float64]
    avg_bits_used: float

    @property
    def perplexity(self) -> float:
        """Exponential of the mean nats a token."""
        return math.exp(float(self.nll.mean()))


def measure(
    calibration: Calibration,
    slices: Mapping[str, Sliced],
    windows: NDArray[np.int64],
    cases: Sequence[ModelDepths],
    *,
    stage: str = "measuring quality",
    dtype: torch.dtype = torch.float32,
) -> list[Measured]:
    """Measure several ways to route a model; all of them go through a block together.

    The embedding and the norms are the checkpoint's.  Its linear layers are replaced meanwhile.

    Args:
        calibration: the context, with the checkpoint.
        slices: by unit name.
        windows: int64 [windows, context] tokens.
        cases: the ways to route.
        stage: name of the stage.
        dtype: of weights and products.

    Returns:
        One result for each case.
    """
    checkpoint, progress = calibration.checkpoint, calibration.stage(stage)
    d = checkpoint.decoder
    blocks, inputs = Blocks(checkpoint, windows.shape[1]), RouterInputs(checkpoint)
    own = windows[processes.share(len(windows))]
    start = blocks.embed(own)
    hidden: list[list[Hidden]] = [list(start) for _ in cases]
    used = np.zeros(len(cases))
    parameters = 0

    def routed(unit: Unit) -> RoutedUnit:
        return RoutedUnit(checkpoint, unit, slices[unit.name], calibration.profile, inputs, dtype=dtype)

    def count(case: int, units: Sequence[RoutedUnit]) -> None:
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
                # Free these weights before the next block's are made.
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
    """Loss of the checkpoint's model as it is.

    Args:
        checkpoint: the model.
        windows: int64 [windows, context] tokens.

    Returns:
        float64 [windows], mean nats a token of each window.
    """
    nll = []
    with torch.no_grad():
        for window in checkpoint.on_device(windows[processes.share(len(windows))]):
            logits = checkpoint.model(window[None], use_cache=False).logits[0]
            nll.append(float(functional.cross_entropy(logits[:-1].float(), window[1:])))
    return np.array(processes.gathered(nll))
