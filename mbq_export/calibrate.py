"""Checkpoint and text in; slices, routers and what they are worth out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.manifest import QualityPoint
from mbq_runtime.bundle.slice_profile import CODE_BITS, SliceProfile
from mbq_runtime.errors import UsageError

from . import processes, quality
from .format.codes import Sliced
from .format.router import RouterParams
from .memory import give_back
from .methods import METHODS, PROVISIONAL_WINDOWS, SECOND, Recipe, tunings
from .model.blocks import fast_dtype
from .model.checkpoint import Checkpoint
from .model.families import Decoder, Unit
from .model.sliced_linear import values_at
from .progress import Report, no_report
from .routing import kinds, provisional, select
from .routing.slice_gains import collect
from .slicing import rtn
from .slicing.by_block import choose_residuals, slice_model
from .slicing.importance import token_importance
from .store import Store
from .transforms.rotation import HeadInput, rotate
from .transforms.smoothing import smooth
from .tuning.tune import Routing, Teacher, tune

CURVE_BITS = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)

_PROVISIONAL_KIND = "mlp"
"""Of the routers that slices are tuned with, where ``recipe.router`` leaves the choice: most often the best."""


@dataclass(frozen=True)
class RoutedLinear:
    """A unit ready to be lowered.  bias: float32 [N] or None."""

    unit: Unit
    sliced: Sliced
    bias: NDArray[np.float32] | None
    router: RouterParams

    @property
    def parameters(self) -> int:
        return int(self.sliced.codes.size)


@dataclass(frozen=True)
class Calibrated:
    """units: by name, in the graph's order; embedding: None when the head's slices serve for it;
    head_scale: float32 [hidden], what such a row of the head is divided by; head_input: what the head's
    input goes through, or None; reference_perplexity: of the original, and curve: of this one by rising
    budgets, on the same held-back text; routers: perplexity of every candidate by
    average bits, its ratio to the shipped one's and the standard error of that, where they were compared."""

    profile: SliceProfile
    group_size: int
    router_kind: str
    units: dict[str, RoutedLinear]
    embedding: Sliced | None
    head_scale: NDArray[np.float32]
    head_input: HeadInput | None = None
    reference_perplexity: float = 0.0
    curve: tuple[QualityPoint, ...] = ()
    routers: select.Comparison = field(default_factory=dict)

    def embedding_factors(self, decoder: Decoder) -> NDArray[np.float32]:
        """float32 [hidden]: what a row of the embedding is multiplied by when it is read."""
        factors = np.full(decoder.hidden_size, decoder.embedding_scale, np.float32)
        return factors if self.embedding is not None else factors / self.head_scale


def calibrate(
    checkpoint: Checkpoint,
    fitted: NDArray[np.int64],
    held_back: NDArray[np.int64],
    recipe: Recipe,
    store: Store | None = None,
    progress: Report = no_report,
) -> Calibrated:
    """Slice every unit, choose and fit its router, set the thresholds jointly, measure the curve.

    fitted, held_back: int64 [windows, context] tokens; slices are fitted to the first, routers and
    thresholds to one half of the second, and measured on the other half.  The checkpoint's weights
    are changed in place, and those of its linear layers released.  ``recipe.group_size`` must divide every unit's K.
    Several processes give the same arguments, and each is given all results.
    Raises ModelError for weights or activations that are not finite, UsageError for fewer windows than processes.
    """

    def stage(what: str) -> Callable[[int, int], None]:
        give_back()
        return lambda done, total: progress(what, done, total)

    store = store or Store(None)
    profile = recipe.profile
    routing_windows, measured_windows = np.array_split(held_back, 2)
    reference = quality.reference(checkpoint, measured_windows)
    slices, embedding, head_scale, head_input = _slices(checkpoint, fitted, recipe, store, stage)
    if checkpoint.decoder.tied:
        head = slices[checkpoint.decoder.head.name]
        table = values_at(head, profile, profile.depths, device=checkpoint.device) / checkpoint.on_device(head_scale)
        checkpoint.model.get_input_embeddings().weight.copy_(table)
    names = list(kinds.ROUTERS) if recipe.router == "auto" else [recipe.router]
    stats = collect(
        checkpoint, slices, profile, routing_windows, recipe.seed,
        keep_inputs=any(kinds.ROUTERS[name].needs_inputs for name in names), progress=stage("measuring slices"),
    )  # fmt: skip
    fits = {}
    for i, name in enumerate(names):
        fits[name] = select.fit(name, stats, slices, profile, recipe.seed)
        progress("fitting routers", i + 1, len(names))
    kind, routers, compared = select.choose(
        checkpoint, fits, slices, profile, recipe.seed, measured_windows, stage("comparing routers")
    )
    bits = [b for b in CURVE_BITS if profile.min_bits <= b]
    cases = [select.case(routers, b) for b in bits]
    results = quality.measure(
        checkpoint, slices, profile, measured_windows, cases, stage("measuring quality"), fast_dtype(checkpoint.device)
    )
    original = float(np.exp(reference.mean()))
    curve = tuple(QualityPoint(b, r.avg_bits_used, r.perplexity) for b, r in zip(bits, results, strict=True))
    linears = {
        unit.name: RoutedLinear(unit, slices[unit.name], checkpoint.bias(unit), routers[unit.name])
        for unit in checkpoint.decoder.units()
    }
    return Calibrated(
        profile, recipe.group_size, kind, linears, embedding, head_scale, head_input, original, curve, compared
    )


def quality_floor(calibrated: Calibrated, ratio: float) -> float:
    """The lowest average bits with a perplexity of at most ``ratio`` times the original's.

    Between the curve's points log perplexity is taken for linear; rounded up to 0.05 bits.
    """
    limit = np.log(ratio * calibrated.reference_perplexity)
    bits = [point.avg_bits_used for point in calibrated.curve]
    loss = np.log([point.perplexity for point in calibrated.curve])
    grid = np.arange(bits[0], CODE_BITS + 0.025, 0.05)
    good = np.interp(grid, bits, loss) <= limit
    # From where on every budget is good; all of 8 bits where none is.
    first = len(good) - int(np.argmin(good[::-1])) if not good.all() else 0
    return round(float(grid[min(first, len(grid) - 1)]), 2)


def worth(calibrated: Calibrated, floor_ratio: float) -> tuple[float, float]:
    """What slices are chosen by, the less the better: the quality floor, and the mean perplexity at 4 to 8 bits.

    The first says how light a model may get; the second decides between equal ones.
    """
    bits = [point.avg_bits_used for point in calibrated.curve]
    loss = np.log([point.perplexity for point in calibrated.curve])
    mean = np.interp([b for b in CURVE_BITS if b >= 4], bits, loss).mean()
    return quality_floor(calibrated, floor_ratio), round(float(np.exp(mean)), 4)


def _slices(
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    recipe: Recipe,
    store: Store,
    stage: Callable[[str], Callable[[int, int], None]],
) -> tuple[dict[str, Sliced], Sliced | None, NDArray[np.float32], HeadInput | None]:
    d, method = checkpoint.decoder, METHODS[recipe.method]
    hessian_windows = windows[:: -(-len(windows) // method.hessian_windows)]
    if len(hessian_windows) < processes.count():
        raise UsageError(
            f"{processes.count()} processes, but {len(hessian_windows)} windows of text to measure inputs on: each "
            f"needs one; start fewer, or give more --calib-tokens ({method.hessian_windows} windows are the most)"
        )
    head_input, head_scale = None, np.ones(d.hidden_size, np.float32)
    if method.feedback and not d.family.post_norms:
        head_input = rotate(checkpoint, recipe.seed)
    else:
        head_scale = smooth(checkpoint, hessian_windows, stage("measuring activations"))
    embedding = None if d.tied else rtn.slice_weight(checkpoint.embedding(), recipe.group_size, "embedding")
    if method.feedback:
        slices = _fed_back(checkpoint, windows, hessian_windows, head_scale, recipe, store, stage)
    else:
        slices = _rounded(checkpoint, recipe.group_size, store, stage("slicing"))
    return slices, embedding, head_scale, head_input


def _rounded(
    checkpoint: Checkpoint, group_size: int, store: Store, progress: Callable[[int, int], None]
) -> dict[str, Sliced]:
    slices: dict[str, Sliced] = {}
    units = list(checkpoint.decoder.units())
    for i, unit in enumerate(units):
        found = store.get(unit.name)
        if found is None:
            rounded = rtn.slice_weight(checkpoint.weight(unit), group_size, unit.name)
            found = store.put(unit.name, {unit.name: rounded})
        slices |= found
        checkpoint.release(unit)
        progress(i + 1, len(units))
    return slices


def _fed_back(
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    hessian_windows: NDArray[np.int64],
    head_scale: NDArray[np.float32],
    recipe: Recipe,
    store: Store,
    stage: Callable[[str], Callable[[int, int], None]],
) -> dict[str, Sliced]:
    """By error feedback, and tuned if that is asked for."""
    profile, sweeps = recipe.profile, METHODS[recipe.method].sweeps
    phases = tunings(recipe.method, profile, recipe.tuning_steps)
    # As many windows as the longest of them has steps for.
    heard = [steps * max(phase.windows_per_step, processes.count()) for phase, steps in phases.items()]
    teacher = Teacher(checkpoint, _spread(windows, max(heard)), stage("listening to the original")) if heard else None
    importance = token_importance(checkpoint, hessian_windows, recipe.seed, store, stage("weighing tokens"))
    slices = slice_model(
        checkpoint, hessian_windows, importance, profile, recipe.group_size, sweeps, SECOND in phases, store,
        stage("slicing blocks"),
    )  # fmt: skip
    if teacher is None:
        return slices
    for i, (phase, steps) in enumerate(phases.items()):
        routing: Routing | None = None
        if phase == SECOND:
            slices = choose_residuals(
                checkpoint, hessian_windows, importance, slices, profile, sweeps, store, stage("choosing residuals")
            )
            routers = provisional.fit(
                _PROVISIONAL_KIND if recipe.router == "auto" else recipe.router, checkpoint, slices, profile,
                _spread(hessian_windows, max(PROVISIONAL_WINDOWS, processes.count())), recipe.seed, store,
                stage("fitting provisional routers"),
            )  # fmt: skip
            routing = partial(select.case, routers)
        slices = tune(
            checkpoint, teacher, slices, head_scale, profile, phase, routing, steps, recipe.seed + i, store,
            stage(phase.name),
        )  # fmt: skip
    return slices


def _spread(windows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most so many of int64 [windows, context], spread over them."""
    count = min(most, len(windows))
    return windows[np.arange(count) * len(windows) // count]
