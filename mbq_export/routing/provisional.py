"""Routers from before the last tuning: slices are tuned with these, for what the final ones will make of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.slice_profile import SliceProfile

from ..format.codes import Sliced
from ..format.router import RouterParams
from ..model.checkpoint import Checkpoint
from ..store import Store
from . import kinds, select
from .slice_gains import collect

_STEP = "provisional routers"


def fit(
    kind: str,
    checkpoint: Checkpoint,
    slices: dict[str, Sliced],
    profile: SliceProfile,
    windows: NDArray[np.int64],
    seed: int,
    store: Store,
    progress: Callable[[int, int], None],
) -> dict[str, RouterParams]:
    """A router of ``kind``, of those in ``candidates``, for every unit, fitted to int64 [windows, context] tokens.

    Taken from ``store`` when it holds them.  Raises ModelError for activations that are not finite.
    """
    kept = store.arrays(_STEP)
    if kept is None:
        inputs = kinds.ROUTERS[kind].needs_inputs
        stats = collect(checkpoint, slices, profile, windows, seed, keep_inputs=inputs, progress=progress)
        fitted = select.fit(kind, stats, slices, profile, seed)
        kept = {
            f"{unit}:{field.name}": getattr(router, field.name)
            for unit, router in fitted.items()
            for field in fields(router)
            if getattr(router, field.name) is not None
        }
        store.put_arrays(_STEP, kept)
    return {
        unit: RouterParams(**{field.name: kept.get(f"{unit}:{field.name}") for field in fields(RouterParams)})  # type: ignore[arg-type]
        for unit in slices
    }
