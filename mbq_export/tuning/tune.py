"""End-to-end tuning: the sliced model learns to predict as the original does.

The loss is the Kullback-Leibler divergence from the original model's next-token distribution, at one budget a step.
Codes stay as they are.  Only depths of few bits get steps (``methods.tuned_bits``): half of them at the shallowest,
which gains most, and the others take turns.  The bits after them are chosen again when the tuning is done
(``slicing.by_block.slice_residuals``), so that deep depths are the original model.

What changes is a matter of the phase.  Gains of rows belong to one depth each, so no depth pays for another.  Scales,
offsets and the weights of norms belong to all depths.  The checkpoint stays the original: what a norm's weight becomes
is divided out of the layers behind it.

A base slice of two bits needs other scales than more bits do, and its divergence is many times theirs.  So it is tuned
twice:

1. The base slice alone, in large steps, whatever this does to the other depths.
2. The slices after it are chosen again, and all tuned depths get steps, with a loss that weighs them alike.  Routers
   choose the depths.  Half of the steps are at budgets between the first depth and the second, so the base slice is
   tuned for the tokens that stay on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import cycle

import numpy as np
import torch
from numpy.typing import NDArray

from mbq_runtime.bundle.slice_profile import SliceProfile

from .. import processes
from ..context import Calibration
from ..format.codes import Sliced, with_scales
from ..methods import Phase, tuned_bits
from ..model.blocks import fast_autocast
from ..model.checkpoint import Checkpoint
from ..model.gradients import lean_backward
from ..model.router_inputs import Depths, RouterInputs, Routing, UnitDepths
from ..model.sliced_linear import CPU, SlicedLinear, sliced_layers
from ..store import Store
from .teacher import Teacher, divergence

_NORM_RATE = 3e-4
_DEEPER_GAIN_RATE = 0.5
"""Learning rate of the gains behind the first depth, as a share of the first one's.  Their divergence is less."""
_BETAS = (0.9, 0.95)
_WARM_UP_STEPS = 8
_SMALLEST_LOSS = 1e-8
_SAVE_EVERY = 20

_WAY_TO_SECOND = (0.25, 0.5, 0.75)
"""Budgets between the first depth and the second, as shares of the way."""


class TunedLinear(SlicedLinear):
    """A ``SlicedLinear`` with trainable scales and offsets, and trainable gains of its tuned depths.

    Changes of scales and offsets are in units of the group's scale, so that one learning rate fits both.

    scale_change: float32 [N, groups], relative change of scales.
    offset_change: float32 [N, groups], change of offsets in scales.
    gain_changes: float32 [N, 1] for each tuned depth, relative change of its gains.

    Args:
        sliced: a matrix [N, K].
        profile: the bits of each slice.
        bias: float32 [N] on ``device``, or None.
        device: where the layer computes.
    """

    def __init__(
        self, sliced: Sliced, profile: SliceProfile, bias: torch.Tensor | None, device: torch.device = CPU
    ) -> None:
        super().__init__(sliced, profile, bias, device)
        self.scale_change = torch.nn.Parameter(torch.zeros_like(self._scale))
        self.offset_change = torch.nn.Parameter(torch.zeros_like(self._scale))
        tuned_depths = sum(bits <= tuned_bits(profile) for bits in profile.depth_bits)
        self.gain_changes = torch.nn.ParameterList(torch.zeros_like(self._gain[:, :1]) for _ in range(tuned_depths))

    @property
    def scale(self) -> torch.Tensor:
        """float32 [N, groups], at the last depth."""
        return self._scale * (1 + self.scale_change)

    @property
    def offset(self) -> torch.Tensor:
        """float32 [N, groups], at the last depth."""
        return self._offset + self._scale * self.offset_change

    @property
    def gain(self) -> torch.Tensor:
        """float32 [N, E]: what each depth multiplies scales and offsets of a row by."""
        tuned = len(self.gain_changes)
        changed = self._gain[:, :tuned] * (1 + torch.cat(list(self.gain_changes), dim=1))
        return torch.cat([changed, self._gain[:, tuned:]], dim=1)


def budget_order(profile: SliceProfile, phase: Phase) -> Iterator[float]:
    """Budgets of the steps in average bits, without end.

    Args:
        profile: the bits of each slice.
        phase: which depths get steps.
    """
    others = [bits for bits in profile.depth_bits if bits <= tuned_bits(profile)]
    if phase.focus is None:
        first, second = profile.depth_bits[:2]
        focal: Iterator[float] = cycle([first + way * (second - first) for way in _WAY_TO_SECOND])
    else:
        focal = cycle([others.pop(phase.focus - 1)])
    if phase.alone or not others:
        yield from focal
    # The deepest first: it is the one that must not get worse.
    for other in cycle(reversed(others)):
        yield next(focal)
        yield other


def tune(
    calibration: Calibration,
    teacher: Teacher,
    slices: dict[str, Sliced],
    phase: Phase,
    steps: int,
    *,
    seed: int,
    routing: Routing | None = None,
) -> dict[str, Sliced]:
    """Tune gains of slices, and if the phase says so their scales and offsets and the norms of the checkpoint.

    It goes on from the step that the store holds.  The checkpoint remains the same function: its linear layers take
    back what its norms change.

    Args:
        calibration: the context.
        teacher: the original model's predictions.
        slices: by unit name.
        phase: how to tune.
        steps: of the optimizer.
        seed: of the order of windows.
        routing: chooses the depths; None: all tokens use the depth of the step's budget.

    Returns:
        Slices with the same codes, by unit name.
    """
    progress, checkpoint, store = calibration.stage(phase.name), calibration.checkpoint, calibration.store
    with (
        _trained_norms(checkpoint, wanted=phase.scale_rate > 0) as norms,
        sliced_layers(checkpoint, slices, calibration.profile, TunedLinear) as tuned,
        lean_backward(checkpoint),
        budget_control(checkpoint, tuned, calibration.profile, routing) as use_budget,
    ):
        changes = [
            change
            for parts in tuned.values()
            for layer in parts
            for change in (layer.scale_change, layer.offset_change)
            if phase.scale_rate
        ]
        # Products of experts that are summed have no gains: a portable graph makes one product of them.
        with_gains = [
            layer
            for unit in checkpoint.decoder.units()
            if phase.gain_rate and not unit.name.endswith(".experts_out")
            for layer in tuned[unit.name]
        ]
        gains = [layer.gain_changes[0] for layer in with_gains]
        deeper_gains = [change for layer in with_gains for change in list(layer.gain_changes)[1:]]
        for parts in tuned.values():
            for layer in parts:
                layer.requires_grad_(False)
        for change in (*changes, *gains, *deeper_gains):
            change.requires_grad_(True)
        parameters = [*changes, *gains, *deeper_gains, *norms]
        optimizer = torch.optim.AdamW(
            [
                {"params": changes, "full_lr": phase.scale_rate, "weight_decay": phase.scale_decay},
                {"params": gains, "full_lr": phase.gain_rate, "weight_decay": 0.0},
                {"params": deeper_gains, "full_lr": phase.gain_rate * _DEEPER_GAIN_RATE, "weight_decay": 0.0},
                {"params": norms, "full_lr": _NORM_RATE, "weight_decay": 0.0},
            ],
            betas=_BETAS,
        )
        done = _restore(store, phase.name, parameters, optimizer)
        order = _Order(len(teacher.windows), phase.windows_per_step, seed)
        budgets = budget_order(calibration.profile, phase)
        for step in range(steps):
            rows, avg_bits = order.next(), next(budgets)
            if step < done:
                continue
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * _share_of_rate(step, steps)
            use_budget(avg_bits)
            _add_gradients(checkpoint, teacher, rows, alike=phase.alike)
            processes.sum_gradients(parameters)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % _SAVE_EVERY == 0 or step + 1 == steps:
                _keep(store, phase.name, parameters, optimizer, step + 1)
            progress(step + 1, steps)
        return {name: _tuned_slices(slices[name], parts) for name, parts in tuned.items()}


def _add_gradients(checkpoint: Checkpoint, teacher: Teacher, rows: torch.Tensor, *, alike: bool) -> None:
    """One step's forward and backward pass over the teacher's windows ``rows``.  alike: see ``Phase``."""
    with fast_autocast(checkpoint.device):
        logits = checkpoint.model(teacher.windows[rows], use_cache=False).logits
    loss = divergence(logits.flatten(0, 1), teacher, teacher.inputs(rows))
    of_all = processes.summed(loss.detach().clone()) if alike else torch.full_like(loss, processes.count())
    # The gradient of the logarithm: a depth counts by the share of its divergence that is removed.
    (loss / of_all.clamp_min(_SMALLEST_LOSS)).backward()


def _tuned_slices(sliced: Sliced, parts: list[TunedLinear]) -> Sliced:
    scale, offset = (
        torch.cat([getattr(layer, name) for layer in parts]).detach().cpu().numpy() for name in ("scale", "offset")
    )
    gain = torch.cat([layer.gain for layer in parts]).detach().cpu().numpy()
    return with_scales(sliced, scale, offset).with_gain(gain)


@contextmanager
def _trained_norms(checkpoint: Checkpoint, *, wanted: bool) -> Iterator[list[torch.Tensor]]:
    """The weights of the blocks' input norms, which get gradients while the block runs.

    Afterwards the layers behind them take back the change.  wanted: otherwise there are none.
    """
    d = checkpoint.decoder
    layers = range(d.layers if wanted else 0)
    readers = {norm: names for layer in layers for norm, names in d.norm_readers(layer).items()}
    before = {name: checkpoint.norm(name).copy() for name in readers}
    norms = [checkpoint.model.get_submodule(name).weight for name in readers]
    for norm in norms:
        norm.requires_grad_(True)
    yield norms
    for norm in norms:
        norm.requires_grad_(False)
    for name, of_norm in readers.items():
        now = checkpoint.norm(name)
        # A gain of 0 hides its channel: no weight behind it can matter.
        back = np.divide(before[name], now, out=np.ones_like(now), where=now != 0)
        for reader in of_norm:
            checkpoint.model.get_submodule(reader).weight.mul_(checkpoint.on_device(back))


@contextmanager
def budget_control(
    checkpoint: Checkpoint, tuned: Mapping[str, list[TunedLinear]], profile: SliceProfile, routing: Routing | None
) -> Iterator[Callable[[float], None]]:
    """Control the depths of layers while the block runs.

    Args:
        checkpoint: the model.
        tuned: its layers, by unit name.
        profile: the bits of each slice.
        routing: chooses the depths; None: all tokens use the depth of the budget.

    Yields:
        A function that sets the budget in average bits.
    """
    if routing is None:

        def use_depth(bits: float) -> None:
            for parts in tuned.values():
                for layer in parts:
                    layer.bits = int(bits)

        yield use_depth
        return
    inputs, depth_bits = RouterInputs(checkpoint), torch.tensor([0, *profile.depth_bits])
    depths = {unit.name: UnitDepths(unit, inputs, checkpoint) for unit in checkpoint.decoder.units()}

    def use_budget(avg_bits: float) -> None:
        for name, of_unit in routing(avg_bits).items():
            depths[name].use(of_unit)

    with ExitStack() as hooks, inputs.recording():
        for unit in checkpoint.decoder.units():
            for source, layer in zip(unit.sources, tuned[unit.name], strict=True):
                of_layer = depths[unit.name].of_layer(source)

                def ask(layer: TunedLinear, args: tuple[torch.Tensor], of: Depths = of_layer) -> None:
                    layer.bits = depth_bits[of(args[0])]

                hooks.enter_context(layer.register_forward_pre_hook(ask))
        yield use_budget


def _share_of_rate(step: int, steps: int) -> float:
    """The learning rate's schedule: a short linear rise, then half a cosine down to 0."""
    return min(1.0, (step + 1) / _WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))


class _Order:
    """Which windows a process takes for a step: all of its windows in random order, then again."""

    def __init__(self, windows: int, windows_per_step: int, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._windows, self._left = windows, torch.empty(0, dtype=torch.long)
        self._at_once = -(-windows_per_step // processes.count())

    def next(self) -> torch.Tensor:
        if len(self._left) < self._at_once:
            self._left = torch.randperm(self._windows, generator=self._generator)
        taken, self._left = self._left[: self._at_once], self._left[self._at_once :]
        return taken


def _keep(store: Store, step: str, parameters: list[torch.Tensor], optimizer: torch.optim.Optimizer, done: int) -> None:
    """Put parameters and the optimizer's state into the store, as arrays named ``index:key``."""
    tensors = {f"{i}:value": parameter.detach() for i, parameter in enumerate(parameters)}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{i}:{key}": tensor for key, tensor in state.items()}
    arrays: dict[str, NDArray[np.generic]] = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    store.put_arrays(step, {**arrays, "done": np.array([done])})


def _restore(store: Store, step: str, parameters: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Load what ``_keep`` put into the store.  Returns the steps that are done."""
    arrays = store.arrays(step)
    if arrays is None:
        return 0
    state: dict[int, dict[str, torch.Tensor]] = {i: {} for i in range(len(parameters))}
    for name, array in arrays.items():
        index, _, key = name.partition(":")
        if key:
            # A copy: the array is a file mapped into memory.  The store keeps scalars as [1].
            tensor = torch.from_numpy(array).clone()
            state[int(index)][key] = tensor.reshape(()) if key == "step" else tensor
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(state[i].pop("value"))
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return int(arrays["done"][0])
