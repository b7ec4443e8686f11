"""What every command that draws a picture shares: the check before the work, and the write after it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
"""Suffixes of the files that can be written."""
_DOTS_PER_INCH = 150


def check(path: Path) -> None:
    """Refuse early what ``save`` would refuse after long work.

    Args:
        path: the file that ``--plot`` names.

    Raises:
        UsageError: matplotlib is missing, the suffix is unknown, or the folder does not exist.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("--plot needs matplotlib, which is not installed: pip install 'mbq-export[plot]'") from None
    if path.suffix.lower() not in FORMATS or not path.parent.is_dir():
        raise UsageError(f"--plot {path}: cannot be written; give a {', '.join(FORMATS)} in a folder that exists")


def save(figure: Figure, path: Path) -> None:
    """Write a picture.  The same figures give the same bytes.

    Args:
        figure: what is drawn.
        path: the file; its suffix is one of ``FORMATS``.

    Raises:
        UsageError: the file cannot be written.
    """
    from matplotlib import rc_context

    # An SVG holds a date and random identifiers by default.
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    try:
        with rc_context({"svg.hashsalt": "mbq"}):
            figure.savefig(path, dpi=_DOTS_PER_INCH, metadata=metadata)
    except OSError as error:
        raise UsageError(f"--plot {path}: cannot be written ({error.strerror or error}); give another place") from None
