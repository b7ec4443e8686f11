"""Calibration methods, and the recipe of one calibration.  Nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mbq_runtime.bundle.slice_profile import SliceProfile

CONTEXT_TOKENS = 512
"""Length of a window of calibration text, in tokens."""

_FITTED_PER_HELD_BACK = 4
"""Windows that are fitted to, for each window that is held back."""
_MOST_HELD_BACK_WINDOWS = 24
"""Each costs a pass at every budget when routers are compared."""

TUNING_ROUTER_WINDOWS = 8
"""Windows that the routers for tuning are fitted to."""

MLP_HIDDEN = 1
"""Width of a learned router.  Every token reads all of its parameters."""


@dataclass(frozen=True)
class Phase:
    """How gains, scales and offsets are tuned end to end (``tuning.tune``).

    name: of the stage, and of its file in the store.
    focus: depth (1-based) that gets half of the steps (all if `alone`).  None: half of the steps use budgets between
        depths 1 and 2, and routers choose the depths in every step.
    alone: whether only the focus gets steps.
    windows_per_step: windows of text a step, at least one for each process.
    scale_rate: Adam's learning rate for scales and offsets, in scales.  0: these and the norms stay as they are.
    gain_rate: the same for the gains of rows at the first depth; at the other tuned depths it is lower.
    alike: whether the loss weighs all depths alike, whatever the size of their divergence.
    scale_decay: decay of changes to scales and offsets, for each unit of the learning rate.
    """

    name: str
    focus: int | None
    alone: bool
    windows_per_step: int
    scale_rate: float
    gain_rate: float
    alike: bool
    scale_decay: float = 0.0


TUNE_GAINS = Phase(
    "tuning gains", focus=1, alone=False, windows_per_step=2, scale_rate=0.0, gain_rate=3e-3, alike=False
)
"""The one tuning of a short calibration.  Each depth has gains of its own, so no depth pays for another."""
TUNE_SCALES = replace(TUNE_GAINS, name="tuning scales", scale_rate=1e-3, gain_rate=0.0)
"""The same for a base slice of two bits, which needs other scales."""
TUNE_SCALES_LONG = replace(TUNE_SCALES, scale_decay=1.2)
"""The one tuning of a long calibration.  Decay keeps the model from learning its text by heart."""
TUNE_BASE_SLICE = Phase(
    "tuning the base slice", focus=1, alone=True, windows_per_step=1, scale_rate=2e-3, gain_rate=0.0, alike=False
)
"""The first of two tunings, for a base slice of 2 bits."""
TUNE_ROUTED = Phase(
    "tuning with routers", focus=None, alone=False, windows_per_step=1, scale_rate=1e-3, gain_rate=0.0, alike=True
)
"""The second of two tunings, after residual slices were chosen for the tuned base slice."""


@dataclass(frozen=True)
class Method:
    """How slices are made.

    help: one line for the user.
    feedback: whether slices are made block by block with error feedback, on a rotated model where the family allows
        it; otherwise weights are rounded to nearest.
    hessian_windows: windows of the text, evenly spread, that second moments of inputs are measured on.
    sweeps: of refinement after the feedback.
    tuning_steps: of end-to-end tuning on all of the text, where slices begin with three bits or more.
    calib_tokens: tokens of calibration text.
    phase: how slices are tuned, where one tuning is enough.
    phase_of_two: the same, where slices begin with two bits.
    steps_of_two: steps of that.
    twice: whether slices that begin with two bits are tuned twice: before and after residual slices are chosen again.
    brief: whether what gains least for its time is left out: the model's own replies in the default text, weights of
        tokens, and the comparison of routers.
    """

    help: str
    feedback: bool
    hessian_windows: int
    sweeps: int
    tuning_steps: int
    calib_tokens: int
    phase: Phase = TUNE_GAINS
    phase_of_two: Phase = TUNE_SCALES
    steps_of_two: int = 0
    twice: bool = False
    brief: bool = False


METHODS = {
    "rtn": Method("round to nearest, no tuning", False, 32, sweeps=0, tuning_steps=0, calib_tokens=40960),
    "quick": Method(
        "error feedback on little text, no tuning, two minutes",
        True, 8, sweeps=0, tuning_steps=0, calib_tokens=4096, brief=True,
    ),
    "nested": Method(
        "error feedback over all depths, then tuned gains, 12 minutes",
        True, 40, sweeps=3, tuning_steps=40, calib_tokens=40960, steps_of_two=80,
    ),
    "learned": Method(
        "as nested, on more text and tuned for longer, an hour or two",
        True, 64, sweeps=6, tuning_steps=1100, calib_tokens=196608, phase=TUNE_SCALES_LONG,
        phase_of_two=TUNE_SCALES_LONG, steps_of_two=500, twice=True,
    ),
}  # fmt: skip


_MOST_TUNED_BITS = 4
"""Depths of more bits are the original model.  Tuning would move them away from it."""


def tuned_bits(profile: SliceProfile) -> int:
    """Bits of the deepest depth that is tuned end to end; 0 if there is none.

    Args:
        profile: the bits of each slice.
    """
    return max((bits for bits in profile.depth_bits if bits <= _MOST_TUNED_BITS), default=0)


AUTO_SLICES = ("3,1,2,2", "2,2,2,2")
"""The profiles that ``--slices auto`` compares."""


def tunings(method: str, profile: SliceProfile, steps: int | None) -> dict[Phase, int]:
    """The tunings of a calibration, in order, each with its number of steps.

    Between a first and a second tuning, residual slices are chosen again (``slicing.by_block.slice_residuals``).

    Args:
        method: a key of ``METHODS``.
        profile: the bits of each slice.
        steps: of all tunings together, or None for the method's own number.
    """
    of = METHODS[method]
    if not tuned_bits(profile):
        return {}
    of_two = profile.min_bits < 3
    twice = of.twice and of_two and profile.depths > 2
    if steps is None:
        steps = of.steps_of_two if of_two else of.tuning_steps
    if twice and steps > 1:
        return {TUNE_BASE_SLICE: steps - steps // 2, TUNE_ROUTED: steps // 2}
    return {of.phase_of_two if of_two else of.phase: steps} if steps else {}


def held_back_windows(fitted: int) -> int:
    """How many windows of text to hold back.

    Args:
        fitted: windows that slices are fitted to.
    """
    return max(2, min(fitted // _FITTED_PER_HELD_BACK, _MOST_HELD_BACK_WINDOWS))


@dataclass(frozen=True)
class Recipe:
    """What is asked of one calibration.

    profile: the bits of each slice.
    group_size: weights that share a scale; it must divide K of every unit.
    method: a key of ``METHODS``.
    tuning_steps: of all tunings together, or None for the method's own number.
    router: a key of ``kinds.ROUTERS``, or "auto" for the best of them.
    seed: of all that is random.
    """

    profile: SliceProfile
    group_size: int
    method: str = "nested"
    tuning_steps: int | None = None
    router: str = "auto"
    seed: int = 0
