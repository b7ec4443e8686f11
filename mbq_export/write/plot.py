"""The quality curve as a picture."""

from __future__ import annotations

from pathlib import Path

from mbq_runtime import plotting
from mbq_runtime.bundle.facts import Quality

_LARGEST_RATIO = 5.0
"""The vertical axis ends here at most.  Text of a larger perplexity is unusable, and would flatten the rest."""


def quality_curve(file: Path, title: str, quality: Quality) -> None:
    """Draw perplexity, over the original model's, against the average bits used, and mark the quality floor.

    Args:
        file: the picture to write; its suffix is one of ``plotting.FORMATS``.
        title: text above the curve, such as the model's name.
        quality: the curve as the manifest has it.

    Raises:
        UsageError: matplotlib is missing, or the file cannot be written.
    """
    plotting.check(file)
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
    plotting.save(figure, file)
