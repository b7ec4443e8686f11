"""The quality curve as a picture."""

from __future__ import annotations

from pathlib import Path

from mbq_runtime.bundle.manifest import Quality
from mbq_runtime.errors import UsageError

SUFFIXES = (".png", ".svg", ".pdf")
_LARGEST_RATIO = 5.0
"""Where the axis ends at most: what lies above is no longer prose, and would flatten the rest."""


def check(file: Path) -> None:
    """Refuse now what would fail after the calibration.  Raises UsageError."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("--plot needs matplotlib, which is not installed: pip install 'mbq-export[plot]'") from None
    if file.suffix not in SUFFIXES or not file.parent.is_dir():
        raise UsageError(f"--plot {file}: cannot be written; give a {', '.join(SUFFIXES)} in a folder that exists")


def quality_curve(file: Path, title: str, quality: Quality) -> None:
    """Write perplexity over the original model's against realised average bits, with the floor marked.

    file: its suffix names the format.  Raises UsageError as ``check`` does, or when the disk refuses.
    """
    check(file)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    bits = [point.avg_bits_used for point in quality.curve]
    ratios = [point.perplexity / quality.reference_perplexity for point in quality.curve]
    axes.plot(bits, ratios, marker="o", label="bundle")
    axes.axhline(1, color="grey", linewidth=1, label=f"original (perplexity {quality.reference_perplexity:.2f})")
    floor = f"quality floor, {quality.floor_bits:g} bits"
    axes.axvline(quality.floor_bits, color="grey", linestyle=":", label=floor)
    axes.set_ylim(top=min(axes.get_ylim()[1], _LARGEST_RATIO))
    axes.set(title=title, xlabel="bits a weight, on average", ylabel="perplexity over the original")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        # Without a date, and with names that are not drawn by lot, the same figures give the same bytes.
        with rc_context({"svg.hashsalt": "mbq"}):
            figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
    except OSError as error:
        raise UsageError(f"--plot {file}: cannot be written ({error.strerror or error}); give another place") from None
