"""No bundle ends in a traceback, a signal or a hang, and none whose content is unchanged gives another reply.

In CI 120 cases of the tiny bundle.  By hand, with exports too:  python tests/fuzz/bundle_attempts.py --cases 10000
"""

from __future__ import annotations

import os

import pytest
from bundle_attempts import Report, originals, run_cases

CASES = int(os.environ.get("MBQ_FUZZ_BUNDLES", "120"))
SEED = int(os.environ.get("MBQ_FUZZ_SEED", "0"))


@pytest.mark.heavy
def test_hostile_bundles() -> None:
    report = run_cases(range(CASES), SEED, Report(), make=lambda folder: originals(folder, targets=()))
    assert report.faults == []
    assert sum(report.refused.values()) > CASES / 4
    assert sum(report.accepted.values()) > CASES / 20
