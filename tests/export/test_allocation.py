"""Which units slices are tuned with, where budgets lie between the first two depths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_checkpoint

from mbq_export.checkpoint import load, locate
from mbq_export.routing import allocation
from mbq_export.routing.norm import average_gain
from mbq_export.routing.statistics import collect
from mbq_export.slicing import rtn
from mbq_export.store import Store
from mbq_runtime.profile import SliceProfile

PROFILE = SliceProfile((2, 2, 2, 2))
WINDOWS = np.random.default_rng(0).integers(0, 250, (2, 600))


def quiet(done: int, total: int) -> None:
    """Nobody watches."""


def test_units_that_gain_most_a_bit_get_the_second_slice_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = load(locate(str(write_checkpoint(tmp_path / "llama", "llama"))))
    slices = {
        unit.name: rtn.slice_weight(checkpoint.weight(unit), 64, unit.name) for unit in checkpoint.decoder.units()
    }
    stats = collect(checkpoint, slices, PROFILE, WINDOWS, seed=0)
    gain = {unit: average_gain(of_unit, PROFILE)[0] for unit, of_unit in stats.items()}
    share = {unit: sliced.codes.size / sum(s.codes.size for s in slices.values()) for unit, sliced in slices.items()}
    store = Store(tmp_path / "work", "inputs")
    found = allocation.between_first_two(checkpoint, slices, PROFILE, WINDOWS, 0, store, quiet)
    for budget, bits in zip((2.5, 3.0, 3.5), found, strict=True):
        assert set(bits) == set(slices)
        kept = [gain[unit] for unit in slices if bits[unit] == 2]
        raised = [gain[unit] for unit in slices if bits[unit] > 2]
        assert min(raised) >= max(kept)
        # The last unit that could be raised is, or is not: by less than its whole slice.
        avg_bits = sum(share[unit] * bits[unit] for unit in slices)
        assert abs(avg_bits - budget) < 2 * max(share.values())
    # Found again where they were kept, not by measuring.
    monkeypatch.delattr(allocation, "collect")
    again = Store(tmp_path / "work", "inputs")
    assert allocation.between_first_two(checkpoint, slices, PROFILE, WINDOWS, 0, again, quiet) == found
