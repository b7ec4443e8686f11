"""No request ends the server, or makes it give an error of its own.

In CI 300 requests.  By hand, with more:  python tests/fuzz/request_attempts.py --cases 5000
"""

from __future__ import annotations

import os

import pytest
from request_attempts import Report, run_cases

CASES = int(os.environ.get("MBQ_FUZZ_REQUESTS", "300"))
SEED = int(os.environ.get("MBQ_FUZZ_SEED", "0"))
MOST_MORE_MB = 100


@pytest.mark.heavy
def test_hostile_requests() -> None:
    report = run_cases(range(CASES), SEED, Report())
    assert report.faults == []
    assert report.statuses["400"] > CASES / 4
    assert report.statuses["200"] > CASES / 50
    assert report.mb_last - report.mb_first < MOST_MORE_MB or not report.mb_first
