"""Temperature, budget and speed over time, one line for each policy."""

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
    """Write the picture.  limits_c: marked in the panel of temperatures.  Raises UsageError when it cannot be done."""
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
