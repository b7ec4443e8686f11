"""Each page of docs/extending adds a working row in fewer than 20 changed lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "tools" / "newcomer.py"


@pytest.mark.heavy
@pytest.mark.parametrize("page", ["policy", "board", "family"])
def test_a_row_is_added_by_its_page(page: str) -> None:
    done = subprocess.run([sys.executable, SCRIPT, page], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert "changed lines, and it works" in done.stdout
