"""Calibration: a checkpoint and text in; slices, routers and their quality out.

Lifecycle of ``calibrate``, with the names that the user sees:

1. "recording teacher outputs": the original model's predictions on held-back text (``tuning.teacher``), their loss
   (``quality.reference``), and its logits on a check prompt.
2. For a model with experts, "choosing windows for experts" (``slicing.expert_windows``).
3. Rotation of the weights (``transforms.rotation``), or "measuring activations" and smoothing
   (``transforms.smoothing``).  The logits must stay as they were (``check``).
4. For a method without feedback: "rounding weights" (``slicing.rtn``).  Otherwise:

   a. "recording teacher outputs" on the text that slices are tuned on, if they are;
   b. "computing token weights" (``slicing.importance``);
   c. "slicing blocks" (``slicing.by_block``);
   d. "tuning gains" or "tuning scales", or for a base slice of two bits "tuning the base slice", "choosing slices after
      2 bits", "fitting routers for tuning" and "tuning with routers" (``tuning.tune``);
   e. "choosing slices after 4 bits" (or as many as are tuned), if slices are tuned (``slicing.by_block``).

5. "measuring slice gains" (``routing.slice_gains``).
6. "fitting routers" of every kind, and "comparing routers" (``routing.select``).
7. "measuring the quality curve" (``quality``), and the logits of the sliced model (``check``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.facts import QualityPoint
from mbq_runtime.errors import UsageError

from . import processes, quality
from .calibrated import CURVE_BITS, Calibrated, HeadInput, RoutedLinear
from .check import check_sliced, check_transformed, looser
from .context import Calibration
from .format.codes import Sliced
from .methods import TUNE_ROUTED, TUNING_ROUTER_WINDOWS, tuned_bits, tunings
from .model.checkpoint import Checkpoint
from .model.recording import Recording, check_prompt, record, record_sliced
from .model.router_inputs import Routing
from .model.sliced_linear import values_at
from .routing import kinds, select
from .routing.slice_gains import measure_gains
from .slicing import rtn
from .slicing.by_block import slice_model, slice_residuals
from .slicing.expert_windows import balanced_windows
from .slicing.importance import alike, token_importance
from .transforms.rotation import rotate
from .transforms.smoothing import smooth
from .tuning.teacher import Teacher
from .tuning.tune import tune


def calibrate(calibration: Calibration, fitted: NDArray[np.int64], held_back: NDArray[np.int64]) -> Calibrated:
    """Slice every unit, select and fit routers, set the thresholds of all units together, and measure the curve.

    The checkpoint's weights change in place, and those of its linear layers are released.  Several processes call it
    with the same arguments, and each gets all results.

    Args:
        calibration: the checkpoint, the recipe, the store and the report.
        fitted: int64 [windows, context] tokens that slices are fitted to.
        held_back: int64 [windows, context] tokens.  Routers are fitted to the first half and measured on the second.

    Returns:
        The calibrated model.

    Raises:
        ModelError: a weight or an activation is not finite, the model predicts nothing, or the sliced model is not the
            model that was loaded.
        UsageError: there are fewer windows than processes.
    """
    checkpoint, profile = calibration.checkpoint, calibration.profile
    routing_windows, measured_windows = np.array_split(held_back, 2)
    original_model = Teacher(calibration, measured_windows, exact=True)
    reference_perplexity = quality.perplexity(quality.reference(original_model))
    original = record(checkpoint, check_prompt(checkpoint, fitted))
    weights = _slice(calibration, fitted, original)
    if checkpoint.decoder.tied:
        _embed_with_slices(calibration, weights)
    selected = _select_routers(calibration, weights.slices, routing_windows, original_model)
    bits = [b for b in CURVE_BITS if profile.min_bits <= b]
    results = quality.curve(
        calibration, weights.slices, original_model, [(b, select.depths_at(selected.routers, b)) for b in bits]
    )
    sliced = record_sliced(
        checkpoint, weights.slices, weights.embedding, profile, original.prompt, per_layer=weights.per_layer
    )
    check_sliced(original, sliced)
    linears = {
        unit.name: RoutedLinear(unit, weights.slices[unit.name], checkpoint.bias(unit), selected.routers[unit.name])
        for unit in checkpoint.decoder.units()
    }
    return Calibrated(
        profile,
        calibration.recipe.group_size,
        selected.kind,
        linears,
        weights.embedding,
        weights.head_scale,
        weights.head_input,
        reference_perplexity,
        tuple(
            QualityPoint(b, r.avg_bits_used, r.perplexity, float(r.divergence.mean()), r.same_top)
            for b, r in zip(bits, results, strict=True)
        ),
        selected.comparison,
        sliced,
        weights.per_layer,
    )


@dataclass(frozen=True)
class _Weights:
    """The sliced weights of a model.  slices: by unit name; the other fields are those of ``Calibrated``."""

    slices: dict[str, Sliced]
    embedding: Sliced | None
    head_scale: NDArray[np.float32]
    head_input: HeadInput | None
    per_layer: Sliced | None


def _slice(calibration: Calibration, windows: NDArray[np.int64], original: Recording) -> _Weights:
    checkpoint, method, d = calibration.checkpoint, calibration.method, calibration.checkpoint.decoder
    hessian_windows = _measured_windows(calibration, windows)
    if len(hessian_windows) < processes.count():
        raise UsageError(
            f"{processes.count()} processes, but {len(hessian_windows)} windows of text to measure inputs on: each "
            f"needs one; start fewer, or give more --calib-tokens ({method.hessian_windows} windows are the most)"
        )
    head_input, head_scale = None, np.ones(d.hidden_size, np.float32)
    if method.feedback and d.turns:
        head_input = rotate(checkpoint, calibration.seed)
    else:
        head_scale = smooth(checkpoint, hessian_windows, calibration.stage("measuring activations"))
    check_transformed(original, record(checkpoint, original.prompt), looser(d))
    embedding = None if d.tied else _rounded(calibration, "embedding", checkpoint.embedding())
    per_layer = _rounded(calibration, "per_layer", checkpoint.per_layer_table()) if d.per_layer_size else None
    slices = _slice_with_feedback(calibration, windows, hessian_windows) if method.feedback else _round(calibration)
    return _Weights(slices, embedding, head_scale, head_input, per_layer)


def _measured_windows(calibration: Calibration, windows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The windows that second moments of inputs are measured on: evenly spread, or those that all experts see."""
    most, checkpoint = calibration.method.hessian_windows, calibration.checkpoint
    if not checkpoint.decoder.layers_of("experts_in") or len(windows) <= most or not calibration.method.feedback:
        return windows[:: -(-len(windows) // most)]
    return balanced_windows(checkpoint, windows, most, calibration.stage("choosing windows for experts"))


def _rounded(calibration: Calibration, name: str, table: NDArray[np.float32]) -> Sliced:
    """A table of which a token reads one row.  Error feedback has no sums of products to feed errors into."""
    found = calibration.store.get(name)
    if found is None:
        sliced = rtn.slice_table(table, calibration.recipe.group_size, calibration.profile, name)
        found = calibration.store.put(name, {name: sliced})
    return found[name]


def _round(calibration: Calibration) -> dict[str, Sliced]:
    progress, checkpoint, store = calibration.stage("rounding weights"), calibration.checkpoint, calibration.store
    group_size = calibration.recipe.group_size
    slices: dict[str, Sliced] = {}
    units = list(checkpoint.decoder.units())
    for i, unit in enumerate(units):
        found = store.get(unit.name)
        if found is None:
            rounded = rtn.slice_unit(checkpoint, unit, group_size, calibration.profile)
            found = store.put(unit.name, {unit.name: rounded})
        slices |= found
        checkpoint.release(unit)
        progress(i + 1, len(units))
    return slices


def _slice_with_feedback(
    calibration: Calibration,
    windows: NDArray[np.int64],
    hessian_windows: NDArray[np.int64],
) -> dict[str, Sliced]:
    """Slice with error feedback, then tune as the recipe says."""
    checkpoint, method = calibration.checkpoint, calibration.method
    phases = tunings(calibration.recipe.method, calibration.profile, calibration.recipe.tuning_steps)
    # As many windows as the longest tuning takes.
    taken = [steps * max(phase.windows_per_step, processes.count()) for phase, steps in phases.items()]
    teacher = Teacher(calibration, _spread(windows, max(taken))) if taken else None
    importance = alike(checkpoint, hessian_windows) if method.brief else token_importance(calibration, hessian_windows)
    slices = slice_model(calibration, hessian_windows, importance, keep_weights=bool(phases))
    if teacher is None:
        return slices
    choose_again = partial(slice_residuals, calibration, hessian_windows, importance)
    for i, (phase, steps) in enumerate(phases.items()):
        routing: Routing | None = None
        if phase == TUNE_ROUTED:
            slices = choose_again(slices, kept_bits=calibration.profile.min_bits, keep_weights=True)
            count = max(TUNING_ROUTER_WINDOWS, processes.count())
            routers = select.routers_for_tuning(calibration, slices, _spread(hessian_windows, count))
            routing = partial(select.depths_at, routers)
        slices = tune(calibration, teacher, slices, phase, steps, seed=calibration.seed + i, routing=routing)
    return choose_again(slices, kept_bits=tuned_bits(calibration.profile))


def _embed_with_slices(calibration: Calibration, weights: _Weights) -> None:
    """Make a tied embedding what the bundle reads: rows of the head at full depth."""
    checkpoint: Checkpoint = calibration.checkpoint
    profile, head = calibration.profile, weights.slices[checkpoint.decoder.head.name]
    table = values_at(head, profile, profile.depths, device=checkpoint.device)
    checkpoint.model.get_input_embeddings().weight.copy_(table / checkpoint.on_device(weights.head_scale))


def _select_routers(
    calibration: Calibration,
    slices: dict[str, Sliced],
    fitted_windows: NDArray[np.int64],
    original: Teacher,
) -> select.Selected:
    names = select.candidates(calibration)
    keep_inputs = any(kinds.ROUTERS[name].needs_inputs for name in names)
    stats = measure_gains(calibration, slices, fitted_windows, keep_inputs=keep_inputs)
    fitted = {}
    for i, name in enumerate(names):
        fitted[name] = select.fit_routers(calibration, name, stats)
        calibration.report("fitting routers", i + 1, len(names))
    # At one depth all routers choose the same.
    if len(fitted) == 1 and (calibration.method.brief or calibration.profile.depths == 1):
        return select.Selected(names[0], fitted[names[0]], {})
    return select.select_kind(calibration, fitted, slices, original)


def _spread(windows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most ``most`` of int64 [windows, context], evenly spread over them."""
    count = min(most, len(windows))
    return windows[np.arange(count) * len(windows) // count]
