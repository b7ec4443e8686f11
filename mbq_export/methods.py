"""What a calibration can be asked for; nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mbq_runtime.bundle.slice_profile import SliceProfile

CONTEXT_TOKENS = 512
"""Length of a window of calibration text."""

_HELD_BACK_SHARE = 4
"""One window is held back for this many that are fitted to."""
_HELD_BACK_WINDOWS = 24
"""No more are: they tell routers apart, and each costs a pass at every budget."""

PROVISIONAL_WINDOWS = 8
"""What routers from before the last tuning are fitted to."""

MLP_HIDDEN = 1
"""Width of a learned router.  On SmolLM2-135M 16, 8, 4 and 2 gave the same perplexity within its standard error, and a
token reads all of it."""


@dataclass(frozen=True)
class Phase:
    """How one tuning goes about it (``slicing.tuning``).

    name: of what the store keeps of it; focus: the depth, 1-based, that half of its steps are at, or all if ``alone``,
    and None for half of them between the first two, and all where routers send them (``routing.provisional``);
    windows_per_step: of text, at least one for each process; scale_rate: Adam's, for scales and offsets, in scales;
    alike: whether the loss weighs depths alike, however small their divergence; scale_decay: of changes, for each unit
    of the rate; next_twice: whether the depth behind the first gets two turns in place of one.
    """

    name: str
    focus: int | None
    alone: bool
    windows_per_step: int
    scale_rate: float
    alike: bool
    scale_decay: float = 0.0
    next_twice: bool = False


ONLY = Phase("tuning scales", focus=1, alone=False, windows_per_step=2, scale_rate=1e-3, alike=False)
LONG = replace(ONLY, scale_decay=1.2, next_twice=True)
"""Text that is read over and over is learned by heart: after 24 windows of it six times, 3 bits had 1.11 times the
original's perplexity on them, and 1.36 on another text.  There decay does as much for 4 bits as six times the windows
(1.102 to 1.094) and takes 1 % from 3 bits.  It leads back to the scales that 8 bits were given, so these need fewer
turns."""
FIRST = Phase("tuning the base slice", focus=1, alone=True, windows_per_step=1, scale_rate=2e-3, alike=False)
SECOND = Phase("tuning again", focus=None, alone=False, windows_per_step=1, scale_rate=1e-3, alike=True)


@dataclass(frozen=True)
class Method:
    """How slices are found.  feedback: block by block with error feedback, on a rotated model where its
    family allows that; else rounding to nearest.  hessian_windows: of the text, spread over it, that the feedback's
    second moments are taken from; sweeps: of refinement behind the feedback; tuning_steps: of end-to-end tuning
    behind all, on all of the text, each as ``phase`` says; calib_tokens: of text it takes; steps_of_two: where slices
    begin with two bits, of a first and a second tuning in place of one."""

    help: str
    feedback: bool
    hessian_windows: int
    sweeps: int
    tuning_steps: int
    calib_tokens: int
    phase: Phase = ONLY
    steps_of_two: int = 0


METHODS = {
    "rtn": Method("round to nearest, no tuning", False, 32, sweeps=0, tuning_steps=0, calib_tokens=40960),
    "nested": Method(
        "error feedback over all depths, then tuned scales, a quarter of an hour",
        True, 32, sweeps=3, tuning_steps=80, calib_tokens=40960,
    ),
    "learned": Method(
        "as nested, on more text and tuned for longer, an hour or two",
        True, 64, sweeps=6, tuning_steps=1100, calib_tokens=196608, phase=LONG, steps_of_two=500,
    ),
}  # fmt: skip


AUTO_SLICES = ("3,1,2,2", "2,2,2,2")
"""What ``--slices auto`` chooses from."""


def tunings(method: str, profile: SliceProfile, steps: int | None) -> dict[Phase, int]:
    """The tunings to come, in order, and how many steps each takes; steps: of all, None for the method's own.

    Between a first and a second one residuals are chosen anew (``sequential.choose_residuals``).
    """
    of = METHODS[method]
    twice = of.steps_of_two > 0 and profile.min_bits < 3 and profile.depths > 2
    if steps is None:
        steps = of.steps_of_two if twice else of.tuning_steps
    if twice and steps > 1:
        return {FIRST: steps - steps // 2, SECOND: steps // 2}
    return {of.phase: steps} if steps else {}


def held_back_windows(fitted: int) -> int:
    """How many windows to hold back beside ``fitted`` to calibrate on."""
    return max(2, min(fitted // _HELD_BACK_SHARE, _HELD_BACK_WINDOWS))


@dataclass(frozen=True)
class Recipe:
    """One calibration.  tuning_steps: of all, None for the method's own; router: a name in ``candidates.ROUTERS``, or
    "auto": the best of them."""

    profile: SliceProfile
    group_size: int
    method: str
    tuning_steps: int | None
    router: str
    seed: int
