"""How a sliced and routed model predicts at a budget, measured block by block on held-back text.

It computes as the bundle does, but does not round activations.  So ``mbq perplexity`` on the bundle gives the same
figures to 0.2 %, or to 0.5 % on one window of text where products are fast (``FAST_BITS``).  KL divergence from the
original tells most: it is 0 for the original alone, and its error is small, because both models read the same text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mbq_runtime.errors import ModelError

from . import processes
from .context import Calibration
from .format.codes import Sliced
from .model.blocks import Blocks, Hidden, autocast, fast_dtype, fast_products, replaced
from .model.routed_linear import RoutedUnit
from .model.router_inputs import ModelDepths, RouterInputs
from .model.shape import Unit
from .tuning.teacher import TOKENS_AT_ONCE, Teacher

FAST_BITS = 5.0
"""Budgets up to this are measured in the device's fast products.  bfloat16 adds 0.0003 to 0.0006 nats to a divergence,
which is much at 8 bits, and at most 1 % here (docs/log.md)."""


_MOST_NATS = 700.0
"""A float64 has no exponential of more than 709."""


@dataclass(frozen=True)
class Measured:
    """Loss and bits of one way to route a model.

    nll: float64 [windows], mean nats a token of each window.
    divergence: float64 [windows], mean KL divergence from the original of each window, nats a token.
    same_top: share of the tokens where both models find the same next token most likely.
    avg_bits_used: average bits per weight over tokens and parameters.
    """

    nll: NDArray[np.float64]
    divergence: NDArray[np.float64]
    same_top: float
    avg_bits_used: float

    @property
    def perplexity(self) -> float:
        """As ``perplexity``."""
        return perplexity(self.nll)


def perplexity(nll: NDArray[np.float64]) -> float:
    """Exponential of the mean nats a token.

    Args:
        nll: float64 [windows], mean nats a token of each window.

    Raises:
        ModelError: the exponential is no number that a float has.
    """
    mean = float(nll.mean())
    if not mean < _MOST_NATS:
        raise ModelError(
            f"the model predicts nothing: its loss on held-back text is {mean:.4g} nats a token, under {_MOST_NATS:g} "
            "is needed; repair its weights, or give another model"
        )
    return math.exp(mean)


def measure(
    calibration: Calibration,
    slices: Mapping[str, Sliced],
    original: Teacher,
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
        original: the original model's predictions for the text to measure on.
        cases: the ways to route.
        stage: name of the stage.
        dtype: of the blocks' weights and products.  Logits are float32: rounded ones would have equal first choices.

    Returns:
        One result for each case.
    """
    checkpoint, progress = calibration.checkpoint, calibration.stage(stage)
    d = checkpoint.decoder
    own = original.windows
    blocks, inputs = Blocks(checkpoint, own.shape[1]), RouterInputs(checkpoint)
    start = blocks.embed(own.cpu().numpy())
    hidden: list[list[Hidden]] = [list(start) for _ in cases]
    used = np.zeros(len(cases))
    parameters = 0

    def routed(unit: Unit, dtype: torch.dtype = dtype, *, keep_weights: bool = True) -> RoutedUnit:
        return RoutedUnit(
            checkpoint, unit, slices[unit.name], calibration.profile, inputs, dtype=dtype, keep_weights=keep_weights
        )

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
    products = fast_products(checkpoint.device, wanted=dtype == torch.bfloat16)
    with torch.no_grad(), products, inputs.recording():
        # It is the largest matrix: four copies of it would take more memory than all other stages.
        head = routed(d.head, torch.float32, keep_weights=False)
        parameters += head.parameters
        found = np.zeros((len(own), len(cases), 3))
        for j, tokens in enumerate(own):
            expected = _Expected(original.log_probabilities(original.inputs(torch.tensor([j]))))
            for i, case in enumerate(cases):
                head.depths.use(case[d.head.name])
                logits = checkpoint.capped(head.layers[0](blocks.final(hidden[i][j])))
                count(i, [head])
                found[j, i] = _of_window(logits, expected, tokens)
    progress(d.layers + 1, d.layers + 1)
    of_windows = np.array(processes.gathered(found))
    used = processes.summed(torch.from_numpy(used)).numpy() / (parameters * of_windows.shape[0] * own.shape[1])
    return [
        Measured(nll, divergence, float(same_top.mean()), float(bits))
        for (nll, divergence, same_top), bits in zip(np.transpose(of_windows, (1, 2, 0)), used, strict=True)
    ]


def curve(
    calibration: Calibration,
    slices: Mapping[str, Sliced],
    original: Teacher,
    cases: Sequence[tuple[float, ModelDepths]],
) -> list[Measured]:
    """Measure the quality curve: in the device's fast products where few bits are, else in float32.

    Args:
        calibration: the context, with the checkpoint.
        slices: by unit name.
        original: the original model's predictions for the text to measure on.
        cases: budgets in average bits, each with the way to route.

    Returns:
        One result for each case.
    """
    stage, fast = "measuring the quality curve", fast_dtype(calibration.checkpoint.device)
    found: dict[float, Measured] = {}
    for dtype in dict.fromkeys((fast, torch.float32)):
        some = {bits: depths for bits, depths in cases if (fast if bits <= FAST_BITS else torch.float32) == dtype}
        if some:
            measured = measure(calibration, slices, original, list(some.values()), stage=stage, dtype=dtype)
            found |= zip(some, measured, strict=True)
    return [found[bits] for bits, _ in cases]


class _Expected:
    """What the original says of one window.

    probabilities: float32 [context, vocab]; top: int64 [context, 1], the likeliest tokens; negative_entropy: nats,
    summed over tokens.

    Args:
        log_probabilities: float32 [context, vocab].
    """

    def __init__(self, log_probabilities: torch.Tensor) -> None:
        self.top = log_probabilities.argmax(-1, keepdim=True)
        self.probabilities = log_probabilities.exp()
        self.negative_entropy = sum(
            _dot(*both)
            for both in zip(
                self.probabilities.split(TOKENS_AT_ONCE), log_probabilities.split(TOKENS_AT_ONCE), strict=True
            )
        )


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.dot(a.flatten(), b.flatten()))


def _of_window(logits: torch.Tensor, expected: _Expected, tokens: torch.Tensor) -> tuple[float, float, float]:
    """Mean negative log-likelihood, mean divergence and share of the same top of one window.

    logits: float32 [context, vocab]; expected: of the original; tokens: int64 [context].
    """
    nll, divergence, same_top = 0.0, expected.negative_entropy, 0.0
    for start in range(0, len(tokens), TOKENS_AT_ONCE):
        at = slice(start, start + TOKENS_AT_ONCE)
        predicted = logits[at].log_softmax(-1)
        same_top += float((predicted.gather(1, expected.top[at]) >= predicted.amax(-1, keepdim=True)).sum())
        following = tokens[start + 1 : start + TOKENS_AT_ONCE + 1]
        nll -= float(predicted[: len(following)].gather(1, following[:, None]).sum())
        divergence -= _dot(expected.probabilities[at], predicted)
    return nll / (len(tokens) - 1), divergence / len(tokens), same_top / len(tokens)


def reference(original: Teacher) -> NDArray[np.float64]:
    """Loss of the original model.

    Args:
        original: its predictions.

    Returns:
        float64 [windows], mean nats a token of each window.
    """
    nll = []
    for row, tokens in enumerate(original.windows):
        expected = original.log_probabilities(original.inputs(torch.tensor([row]))[:-1])
        nll.append(-float(expected.gather(1, tokens[1:, None]).mean()))
    return np.array(processes.gathered(nll))
