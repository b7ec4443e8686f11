"""How long stages take."""

from __future__ import annotations

import pytest

from mbq_export import progress
from mbq_export.progress import StageTimes


def test_a_stage_lasts_until_the_next_and_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([(0.0, 0.0), (1.0, 1.5), (2.0, 2.5), (4.0, 5.5), (7.0, 9.5), (8.0, 10.0)])
    monkeypatch.setattr(progress, "_now", lambda: next(clock))
    times = StageTimes()
    with times as report:
        report("slicing blocks", 1, 2)
        report("slicing blocks", 2, 2)
        report("tuning scales", 1, 1)
        report("slicing blocks", 1, 1)
    assert times.elapsed_s == {"slicing blocks": 3.0, "tuning scales": 3.0}
    assert times.processor_s == {"slicing blocks": 3.5, "tuning scales": 4.0}
