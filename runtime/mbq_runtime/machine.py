"""What machine this is."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name(root: Path = Path("/")) -> str | None:
    """Name of the processor; None is unknown.

    Args:
        root: folder that holds ``proc``.
    """
    try:
        info = (root / "proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")), None)


def machine_name() -> str:
    """Names of the machine and of its processor: what tells it from others."""
    return f"{platform.node()} {cpu_name()}"
