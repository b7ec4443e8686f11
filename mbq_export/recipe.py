"""What a calibration can be asked for; nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass

from mbq_runtime.profile import SliceProfile

CONTEXT_TOKENS = 512
"""Length of a window of calibration text."""

_HELD_BACK_SHARE = 4
"""One window is held back for this many that are fitted to."""
_HELD_BACK_WINDOWS = 24
"""No more are: they tell routers apart, and each costs a pass at every budget."""

MLP_HIDDEN = 1
"""Width of a learned router.  On SmolLM2-135M 16, 8, 4 and 2 gave the same perplexity within its standard error, and a
token reads all of it."""


@dataclass(frozen=True)
class Method:
    """How slices are found.  feedback: block by block with error feedback, on a rotated model where its
    family allows that; else rounding to nearest.  hessian_windows: of the text, spread over it, that the feedback's
    second moments are taken from; sweeps: of refinement behind the feedback; tuning_steps: of end-to-end tuning
    behind all, on all of the text; twice: whether a base slice of two bits is tuned once more, for half as long,
    behind residuals chosen for what the first tuning made of it; calib_tokens: of text it takes."""

    help: str
    feedback: bool
    hessian_windows: int
    sweeps: int
    tuning_steps: int
    twice: bool
    calib_tokens: int


METHODS = {
    "rtn": Method("round to nearest, no tuning", False, 32, sweeps=0, tuning_steps=0, twice=False, calib_tokens=40960),
    "nested": Method(
        "error feedback over all depths, then tuned scales, a quarter of an hour",
        True, 32, sweeps=3, tuning_steps=80, twice=False, calib_tokens=40960,
    ),
    "learned": Method(
        "as nested, on more text and tuned for longer, an hour",
        True, 64, sweeps=6, tuning_steps=900, twice=True, calib_tokens=196608,
    ),
}  # fmt: skip


AUTO_SLICES = ("3,1,2,2", "2,2,2,2")
"""What ``--slices auto`` chooses from."""


def steps_again(method: str, profile: SliceProfile, tuning_steps: int) -> int:
    """How many steps of tuning follow a choice of new residuals (``sequential.choose_residuals``); 0 for neither."""
    wanted = METHODS[method].twice and profile.min_bits < 3 and profile.depths > 2
    return tuning_steps // 2 if wanted else 0


def held_back_windows(fitted: int) -> int:
    """How many windows to hold back beside ``fitted`` to calibrate on."""
    return max(2, min(fitted // _HELD_BACK_SHARE, _HELD_BACK_WINDOWS))


@dataclass(frozen=True)
class Recipe:
    """One calibration.  tuning_steps: instead of the method's; router: a name in ``candidates.ROUTERS``, or
    "auto": the best of them."""

    profile: SliceProfile
    group_size: int
    method: str
    tuning_steps: int
    router: str
    seed: int
