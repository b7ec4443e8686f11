"""What a benchmark ran on: the commit of the code, and the machine.  Each benchmark prints it first."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from mbq_runtime.bench import environment
from mbq_runtime.sensing import Sensors

_ROOT = Path(__file__).resolve().parents[2]


def measured_on(**more: Any) -> dict[str, Any]:
    """Describe the code and the machine; a file of ``results/`` wants both.

    Args:
        more: what else decides the figures, such as the number of threads.
    """
    return {"commit": commit(), **environment(Sensors().read), **more}


def commit() -> str | None:
    """The commit of the code, with "+" where files have changed since; None where git does not know."""
    command = ["git", "describe", "--always", "--abbrev=7", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, encoding="utf-8", check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
