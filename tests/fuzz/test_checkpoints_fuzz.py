"""No checkpoint and no option ends in a traceback, a signal or a hang: a refusal is one line.

In CI 96 cases.  By hand, with more:  MBQ_FUZZ_CASES=2000 python -m pytest tests/fuzz
"""

from __future__ import annotations

import os

import pytest
from attempts import Report, run_cases

CASES = int(os.environ.get("MBQ_FUZZ_CASES", "96"))
SEED = int(os.environ.get("MBQ_FUZZ_SEED", "0"))


@pytest.mark.heavy
def test_hostile_checkpoints_and_options() -> None:
    report = run_cases(range(CASES), SEED, Report())
    assert report.faults == []
    # The mutations are neither all harmless nor all noticed at once.
    assert sum(report.refused.values()) > CASES / 4
    assert sum(report.accepted.values()) > CASES / 20
