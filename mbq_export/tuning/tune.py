"""Tunes scales and offsets, and the norms' gains, so that the sliced model speaks as the original does.

End to end: the loss is the Kullback-Leibler divergence from the original model's next-token
distribution, at one depth a step.  Codes stay as they are.  Half of the steps are at the shallowest depth,
which has most to gain; the others take turns, without which they would drift away.

A base slice of two bits wants other scales than all 8 bits do, and its divergence is many times theirs.  There it has
its way at first, in large steps, whatever that does to the others; then the residual slices are chosen anew for what it
made of the scales (``sequential.choose_residuals``), and all is tuned again, with a loss that weighs depths alike.
That time routers choose the depths, and half of the steps are at budgets between the first depth and the second: what
keeps the base slice there, and only that, learns to do well by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import cycle
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from mbq_runtime.bundle.slice_profile import CODE_BITS, SliceProfile

from .. import processes
from ..format.codes import Sliced
from ..methods import Phase
from ..model.blocks import fast, fast_dtype, lean_backward
from ..model.checkpoint import Checkpoint
from ..model.router_inputs import Depths, RouterInputs, UnitDepths
from ..model.sliced_linear import CPU, SlicedLinear, sliced_layers
from ..store import Store

_NORM_RATE = 3e-4
_BETAS = (0.9, 0.95)
_WARM_UP_STEPS = 8
_SMALLEST_LOSS = 1e-8
_SAVE_EVERY = 20
_TOKENS_AT_ONCE = 64

_WAY_TO_SECOND = (0.25, 0.5, 0.75)

Routing = Callable[[float], Mapping[str, Depths]]
"""From average bits to what chooses depths, by unit."""


class Teacher:
    """The original model's predictions for this process's share of some windows, kept as its head's inputs.

    Made before the model is sliced.  windows: int64 [windows, context].
    """

    def __init__(
        self, checkpoint: Checkpoint, windows: NDArray[np.int64], progress: Callable[[int, int], None]
    ) -> None:
        self.windows = checkpoint.on_device(windows[processes.share(len(windows))])
        inputs = []
        with torch.no_grad(), fast(checkpoint.device):
            for i, window in enumerate(self.windows):
                inputs.append(checkpoint.model.model(window[None], use_cache=False).last_hidden_state[0].bfloat16())
                progress(i + 1, len(self.windows))
        self._inputs = torch.stack(inputs)
        head, dtype = checkpoint.model.lm_head, fast_dtype(checkpoint.device)
        # A copy: slicing writes into the checkpoint's.
        self._weight = head.weight.detach().to(dtype, copy=True)
        self._bias = None if head.bias is None else head.bias.detach().to(dtype, copy=True)

    def inputs(self, rows: torch.Tensor) -> torch.Tensor:
        """bfloat16 [len(rows) * context, hidden]: what the head is given for the windows in ``rows``."""
        return self._inputs[rows].flatten(0, 1)

    def log_probabilities(self, inputs: torch.Tensor) -> torch.Tensor:
        """float32 [len(inputs), vocab] for some of ``inputs``."""
        return functional.linear(inputs.to(self._weight.dtype), self._weight, self._bias).float().log_softmax(-1)


class _Divergence(torch.autograd.Function):
    """Mean Kullback-Leibler divergence of the teacher's distributions from those of ``logits``, [tokens, vocab].

    The gradient is worked out beside the value, a few tokens at a time: a whole batch of distributions would not
    fit the cache, and moving it about would cost as much as a quarter of the model.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, teacher: Teacher, inputs: torch.Tensor) -> torch.Tensor:
        gradient, total = torch.empty_like(logits), 0.0
        for start in range(0, len(logits), _TOKENS_AT_ONCE):
            tokens = slice(start, start + _TOKENS_AT_ONCE)
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


class _Tuned(SlicedLinear):
    """With trainable scales and offsets, both counted in the group's scale, so that one learning rate suits all."""

    def __init__(self, sliced: Sliced, bias: torch.Tensor | None, device: torch.device = CPU) -> None:
        super().__init__(sliced, bias, device)
        self.scale_change = torch.nn.Parameter(torch.zeros_like(self._scale))
        self.offset_change = torch.nn.Parameter(torch.zeros_like(self._scale))

    @property
    def scale(self) -> torch.Tensor:
        return self._scale * (1 + self.scale_change)

    @property
    def offset(self) -> torch.Tensor:
        return self._offset + self._scale * self.offset_change


def budget_order(profile: SliceProfile, phase: Phase) -> Iterator[float]:
    """Average bits of the steps, without end."""
    others = list(profile.depth_bits)
    if phase.focus is None:
        first, second = others[:2]
        focal: Iterator[float] = cycle([first + way * (second - first) for way in _WAY_TO_SECOND])
    else:
        focal = cycle([others.pop(phase.focus - 1)])
    if phase.alone or not others:
        yield from focal
    # The deepest first: it is the one that must not get worse.
    turns = [others[-1], *others[:-1]]
    if phase.next_twice:
        turns.append(others[0])
    for other in cycle(turns):
        yield next(focal)
        yield other


def _norm_weights(checkpoint: Checkpoint) -> list[torch.Tensor]:
    d = checkpoint.decoder
    names = [d.input_norm(layer, role) for layer in range(d.layers) for role in ("attn_in", "mlp_in")]
    return [checkpoint.model.get_submodule(name).weight for name in (*names, d.final_norm)]


def tune(
    checkpoint: Checkpoint,
    teacher: Teacher,
    slices: dict[str, Sliced],
    head_scale: NDArray[np.float32],
    profile: SliceProfile,
    phase: Phase,
    routing: Routing | None,
    steps: int,
    seed: int,
    store: Store,
    progress: Callable[[int, int], None],
) -> dict[str, Sliced]:
    """The same codes with better scales and offsets; norms change in the checkpoint.

    head_scale: float32 [hidden], what a row of the head is divided by to serve as a tied embedding; routing: what
    chooses depths, which a phase without a focus needs.
    Goes on from the step that ``store`` holds; the checkpoint's linear layers are not changed.
    """
    with (
        sliced_layers(checkpoint, slices, _Tuned) as tuned,
        lean_backward(checkpoint),
        _routed(checkpoint, tuned, profile, routing) as use_budget,
    ):
        layers = [layer for parts in tuned.values() for layer in parts]
        norms = _norm_weights(checkpoint)
        for norm in norms:
            norm.requires_grad_(True)
        changes = [change for layer in layers for change in (layer.scale_change, layer.offset_change)]
        optimizer = torch.optim.AdamW(
            [
                {"params": changes, "full_lr": phase.scale_rate, "weight_decay": phase.scale_decay},
                {"params": norms, "full_lr": _NORM_RATE, "weight_decay": 0.0},
            ],
            betas=_BETAS,
        )
        parameters = [*changes, *norms]
        done = _restore(store, phase.name, parameters, optimizer)
        order = _Order(len(teacher.windows), phase.windows_per_step, seed)
        budgets = budget_order(profile, phase)
        for step in range(steps):
            rows, avg_bits = order.next(), next(budgets)
            if step < done:
                continue
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * _share_of_rate(step, steps)
            use_budget(avg_bits)
            if checkpoint.decoder.tied and step % _SAVE_EVERY == 0:
                _refresh_embedding(checkpoint, tuned, head_scale)
            with fast(checkpoint.device):
                logits = checkpoint.model(teacher.windows[rows], use_cache=False).logits
            loss = _Divergence.apply(logits.flatten(0, 1), teacher, teacher.inputs(rows))  # type: ignore[no-untyped-call]
            divergence = loss.detach()
            of_all = processes.summed(divergence.clone()) if phase.alike else torch.full_like(loss, processes.count())
            # As the gradient of its logarithm would have it, a depth counts for the share of its divergence that goes,
            # however small that is.
            (loss / of_all.clamp_min(_SMALLEST_LOSS)).backward()
            processes.sum_gradients(parameters)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % _SAVE_EVERY == 0 or step + 1 == steps:
                _keep(store, phase.name, parameters, optimizer, step + 1)
            progress(step + 1, steps)
        for norm in norms:
            norm.requires_grad_(False)
        if checkpoint.decoder.tied:
            _refresh_embedding(checkpoint, tuned, head_scale)
        return {
            name: Sliced(
                slices[name].codes,
                torch.cat([layer.scale for layer in parts]).detach().cpu().numpy().astype(np.float16),
                torch.cat([layer.offset for layer in parts]).detach().cpu().numpy().astype(np.float16),
            )
            for name, parts in tuned.items()
        }


@contextmanager
def _routed(
    checkpoint: Checkpoint, tuned: Mapping[str, list[_Tuned]], profile: SliceProfile, routing: Routing | None
) -> Iterator[Callable[[float], None]]:
    """While the block runs, layers are at the average bits that what is yielded was last given: by ``routing``, or,
    without it, all at the depth of so many."""
    if routing is None:

        def use_depth(bits: float) -> None:
            for parts in tuned.values():
                for layer in parts:
                    layer.bits = int(bits)

        yield use_depth
        return
    inputs, depth_bits = RouterInputs(checkpoint), torch.tensor([0, *profile.depth_bits])
    depths = {unit.name: UnitDepths(unit, inputs) for unit in checkpoint.decoder.units()}

    def use_budget(avg_bits: float) -> None:
        for name, of_unit in routing(avg_bits).items():
            depths[name].use(of_unit)

    with ExitStack() as hooks, inputs.recording():
        for name, parts in tuned.items():
            for layer in parts:

                def ask(layer: _Tuned, args: tuple[torch.Tensor], depths: UnitDepths = depths[name]) -> None:
                    layer.bits = depth_bits[depths.of(args[0])]

                hooks.enter_context(layer.register_forward_pre_hook(ask))
        yield use_budget


def _share_of_rate(step: int, steps: int) -> float:
    """A short rise, then half a cosine down to nothing."""
    return min(1.0, (step + 1) / _WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))


class _Order:
    """Which of its windows a process takes for a step: all of them in random order, then again."""

    def __init__(self, windows: int, windows_per_step: int, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._windows, self._left = windows, torch.empty(0, dtype=torch.long)
        self._at_once = -(-windows_per_step // processes.count())

    def next(self) -> torch.Tensor:
        if len(self._left) < self._at_once:
            self._left = torch.randperm(self._windows, generator=self._generator)
        taken, self._left = self._left[: self._at_once], self._left[self._at_once :]
        return taken


def _refresh_embedding(checkpoint: Checkpoint, tuned: dict[str, list[_Tuned]], head_scale: NDArray[np.float32]) -> None:
    """A tied embedding is read from the head's slices at full depth."""
    (head,) = tuned[checkpoint.decoder.head.name]
    with torch.no_grad():
        table = head.weight_at(CODE_BITS) / checkpoint.on_device(head_scale)
        checkpoint.model.get_input_embeddings().weight.copy_(table)


def _keep(store: Store, step: str, parameters: list[torch.Tensor], optimizer: torch.optim.Optimizer, done: int) -> None:
    arrays: dict[str, NDArray[np.generic]] = {"done": np.array([done])}
    for i, parameter in enumerate(parameters):
        state = optimizer.state[parameter]
        kept = {"value": parameter.detach(), "first": state["exp_avg"], "second": state["exp_avg_sq"]}
        arrays |= {f"{i}:{name}": tensor.cpu().numpy() for name, tensor in kept.items()}
    store.put_arrays(step, arrays)


def _restore(store: Store, step: str, parameters: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Put back what ``_keep`` kept; returns how many steps are done."""
    arrays = store.arrays(step)
    if arrays is None:
        return 0
    done = int(arrays["done"][0])
    for i, parameter in enumerate(parameters):
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(arrays[f"{i}:value"]))
        optimizer.state[parameter] = {
            "step": torch.tensor(float(done)),
            "exp_avg": torch.from_numpy(arrays[f"{i}:first"]).clone().to(parameter.device),
            "exp_avg_sq": torch.from_numpy(arrays[f"{i}:second"]).clone().to(parameter.device),
        }
    return done
