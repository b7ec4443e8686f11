"""The routers that slices are tuned with: those of their kind, and kept in the store."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_checkpoint

from mbq_export.context import Calibration
from mbq_export.methods import Recipe
from mbq_export.model.loading import load
from mbq_export.model.source import locate
from mbq_export.routing import select
from mbq_export.routing.slice_gains import measure_gains
from mbq_export.slicing import rtn
from mbq_export.store import Store
from mbq_runtime.bundle.slice_profile import SliceProfile

PROFILE = SliceProfile((2, 2, 2, 2))
WINDOWS = np.random.default_rng(0).integers(0, 250, (2, 60))


@pytest.mark.parametrize("kind", ["static", pytest.param("mlp", marks=pytest.mark.heavy)])
def test_they_are_those_of_their_kind_and_kept(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = load(locate(str(write_checkpoint(tmp_path / "llama", "llama"))))
    slices = {unit.name: rtn.slice_unit(checkpoint, unit, 64, PROFILE) for unit in checkpoint.decoder.units()}
    recipe = Recipe(PROFILE, 64, router=kind)

    def calibration() -> Calibration:
        return Calibration(checkpoint, recipe, Store(tmp_path / "work", "inputs"))

    stats = measure_gains(calibration(), slices, WINDOWS, keep_inputs=True)
    expected = select.fit_routers(calibration(), kind, stats)
    found = select.routers_for_tuning(calibration(), slices, WINDOWS)
    # The second time they come from the store.
    monkeypatch.delattr(select, "measure_gains")
    again = select.routers_for_tuning(calibration(), slices, WINDOWS)
    for routers in (found, again):
        assert set(routers) == set(slices)
        for unit, router in routers.items():
            for name, value in asdict(expected[unit]).items():
                np.testing.assert_array_equal(getattr(router, name), value, err_msg=f"{unit}: {name}")
