"""The commit of the code that a tool measures."""

from __future__ import annotations

import subprocess
from pathlib import Path


def this_commit() -> str:
    """Seven digits, with "-dirty" where files have changed since; "unknown" where git does not know."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
