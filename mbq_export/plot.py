"""The quality curve as a picture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mbq_runtime.errors import UsageError

_LARGEST_RATIO = 5.0
"""Where the axis ends at most: what lies above is no longer prose, and would flatten the rest."""


class Point(NamedTuple):
    """avg_bits: realised; ppl: at that budget."""

    avg_bits: float
    ppl: float


def quality_curve(
    file: Path,
    title: str,
    reference_ppl: float,
    curves: dict[str, Iterable[Point]],
    floor_bits: float | None = None,
) -> None:
    """Write perplexity over the float32 model's against average bits, a line for each named curve.

    file: its suffix names the format (png, svg, pdf); floor_bits: marked when given.
    Raises UsageError when matplotlib is not installed or the file cannot be written.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("a plot needs matplotlib, which is not installed: pip install 'mbq-export[plot]'") from None

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        ordered = sorted(points)
        axes.plot([p.avg_bits for p in ordered], [p.ppl / reference_ppl for p in ordered], marker="o", label=name)
    axes.axhline(1, color="grey", linewidth=1, label=f"float32 (perplexity {reference_ppl:.2f})")
    if floor_bits is not None:
        axes.axvline(floor_bits, color="grey", linestyle=":", label=f"quality floor, {floor_bits:g} bits")
    axes.set_ylim(top=min(axes.get_ylim()[1], _LARGEST_RATIO))
    axes.set(title=title, xlabel="bits a weight, on average", ylabel="perplexity over float32")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        # Without a date, and with names that are not drawn by lot, the same figures give the same bytes.
        with rc_context({"svg.hashsalt": "mbq"}):
            figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix in (".svg", ".pdf") else None)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--plot {file}: cannot be written ({error}); give a .png, .svg or .pdf in a folder that exists"
        ) from None
