"""A picture of temperature, budget and speed over time, with one line for each policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mbq_runtime import plotting

from .closed_loop import PolicyRun, Sample

_PANELS: tuple[tuple[str, Callable[[Sample], float | None]], ...] = (
    ("temperature, °C", lambda sample: sample.temp_c),
    ("budget, bits", lambda sample: sample.bits),
    ("tokens/s", lambda sample: sample.tokens_per_s),
)


def draw(runs: Sequence[PolicyRun], title: str, limits_c: Sequence[float], path: Path) -> None:
    """Write the picture.

    Args:
        runs: one run for each policy.
        title: title of the picture.
        limits_c: temperatures in C that are marked with a line.
        path: the file; its suffix is one of ``plotting.FORMATS``.

    Raises:
        UsageError: matplotlib is missing, or the file cannot be written.
    """
    plotting.check(path)
    from matplotlib.figure import Figure

    panels = [(label, value) for label, value in _PANELS if any(value(s) is not None for r in runs for s in r.samples)]
    figure = Figure(figsize=(9, 2.4 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for (label, value), axis in zip(panels, axes, strict=True):
        for run in runs:
            minutes = [sample.time_s / 60 for sample in run.samples]
            axis.plot(minutes, [value(sample) for sample in run.samples], label=run.name, linewidth=1.2)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    for limit_c in limits_c if panels[0][0] == _PANELS[0][0] else ():
        axes[0].axhline(limit_c, color="black", linestyle=":", linewidth=1)
    axes[0].set_title(title)
    axes[0].legend(fontsize="small")
    axes[-1].set_xlabel("minutes")
    plotting.save(figure, path)
