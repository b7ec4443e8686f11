"""The teacher: the original model's predictions, which the sliced model is tuned to and measured by."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from .. import processes
from ..context import Calibration
from ..model.blocks import fast_dtype, fast_passes

TOKENS_AT_ONCE = 64
"""Tokens whose distributions are computed together.  They fit the processor's cache."""


class Teacher:
    """The original model's predictions for this process's share of some windows.

    It keeps the inputs of the model's head, and a copy of the head.  Make it before the model is sliced.

    windows: int64 [own windows, context], on the model's device.

    Args:
        calibration: the context, with the original model.
        windows: int64 [windows, context] tokens.
        exact: whether its products are computed in float32.
    """

    def __init__(self, calibration: Calibration, windows: NDArray[np.int64], *, exact: bool = False) -> None:
        progress, checkpoint = calibration.stage("recording teacher outputs"), calibration.checkpoint
        dtype = torch.float32 if exact else fast_dtype(checkpoint.device)
        model = checkpoint.model.model
        self.windows = checkpoint.on_device(windows[processes.share(len(windows))])
        inputs = []
        with torch.no_grad() if exact else fast_passes(model, checkpoint.device):
            for i, window in enumerate(self.windows):
                found = model(window[None], use_cache=False).last_hidden_state[0]
                inputs.append(found.float() if exact else found.bfloat16())
                progress(i + 1, len(self.windows))
        # A process may have no window of its own.
        none = torch.empty(0, windows.shape[1], checkpoint.decoder.hidden_size, device=checkpoint.device)
        self._inputs = torch.stack(inputs) if inputs else none
        head, self._capped = checkpoint.model.lm_head, checkpoint.capped
        # A copy: slicing writes into the checkpoint's.
        self._weight = head.weight.detach().to(dtype, copy=True)
        self._bias = None if head.bias is None else head.bias.detach().to(dtype, copy=True)

    def of(self, rows: Sequence[int]) -> Teacher:
        """The same for some of this process's windows.

        Args:
            rows: which of ``windows``.
        """
        some, chosen = copy(self), torch.tensor(rows, dtype=torch.long)
        some.windows, some._inputs = self.windows[chosen], self._inputs[chosen]
        return some

    def inputs(self, rows: torch.Tensor) -> torch.Tensor:
        """Inputs of the head.

        Args:
            rows: int64, which of ``windows``.

        Returns:
            [len(rows) * context, hidden], bfloat16, or float32 if exact.
        """
        return self._inputs[rows].flatten(0, 1)

    def log_probabilities(self, inputs: torch.Tensor) -> torch.Tensor:
        """The original model's log probabilities of next tokens.

        Args:
            inputs: [tokens, hidden], some of ``inputs``.

        Returns:
            float32 [tokens, vocab].
        """
        logits = functional.linear(inputs.to(self._weight.dtype), self._weight, self._bias).float()
        return self._capped(logits).log_softmax(-1)


def divergence(logits: torch.Tensor, teacher: Teacher, inputs: torch.Tensor) -> torch.Tensor:
    """Mean Kullback-Leibler divergence of predictions from the teacher's.

    Args:
        logits: [tokens, vocab] of the sliced model.
        teacher: the original model's predictions.
        inputs: bfloat16 [tokens, hidden], from ``Teacher.inputs`` for the same tokens.

    Returns:
        float32 scalar, nats a token.
    """
    value: torch.Tensor = _Divergence.apply(logits, teacher, inputs)  # type: ignore[no-untyped-call]
    return value


class _Divergence(torch.autograd.Function):
    """Computes the gradient together with the value, a few tokens at a time.

    The distributions of all tokens would not fit the cache, and memory would bound the speed.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, teacher: Teacher, inputs: torch.Tensor) -> torch.Tensor:
        gradient, total = torch.empty_like(logits), 0.0
        for start in range(0, len(logits), TOKENS_AT_ONCE):
            tokens = slice(start, start + TOKENS_AT_ONCE)
            target, student = teacher.log_probabilities(inputs[tokens]), logits[tokens].float().log_softmax(-1)
            probability = target.exp()
            total += float(target.sub_(student).mul_(probability).sum())
            gradient[tokens] = student.exp_().sub_(probability).div_(len(logits))
        ctx.save_for_backward(gradient)
        return torch.tensor(total / len(logits)).to(logits.device)

    @staticmethod
    def backward(ctx: Any, of_value: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * of_value.to(gradient.dtype), None, None
