"""Which units get a second slice and which do not, where not all can: every token alike, by what a slice is worth.

Slices are tuned at such budgets before there are routers, for what routers will make of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.profile import SliceProfile

from ..checkpoint import Checkpoint
from ..slicing.reference import Sliced, route
from ..store import Store
from . import choice
from .statistics import collect

_WAY_TO_SECOND = (0.25, 0.5, 0.75)
_STEP = "allocations"


def between_first_two(
    checkpoint: Checkpoint,
    slices: dict[str, Sliced],
    profile: SliceProfile,
    windows: NDArray[np.int64],
    seed: int,
    store: Store,
    progress: Callable[[int, int], None],
) -> list[dict[str, int]]:
    """Bits by unit for budgets a quarter, a half and three quarters of the way from the first depth to the second.

    As the static kind of router has it, which is fitted to int64 [windows, context] tokens; taken from ``store`` when
    it holds them.  Raises ModelError for activations that are not finite.
    """
    kept = store.arrays(_STEP)
    if kept is None:
        stats = collect(checkpoint, slices, profile, windows, seed, progress=progress)
        routers = choice.fit("static", stats, slices, profile, seed)
        first, second = profile.depth_bits[:2]
        budgets = [first + way * (second - first) for way in _WAY_TO_SECOND]
        any_token = np.ones((1, 1), np.float32)
        depths = {unit: [int(route(any_token, b, router)[0]) for b in budgets] for unit, router in routers.items()}
        kept = {unit: np.array([profile.depth_bits[depth - 1] for depth in at]) for unit, at in depths.items()}
        store.put_arrays(_STEP, kept)
    return [{unit: int(bits[i]) for unit, bits in kept.items()} for i in range(len(_WAY_TO_SECOND))]
