"""Draw the pictures of README.md and docs/.

    python docs/figures/make.py [--out FOLDER]

- heat.svg: temperature and budget of a simulated Raspberry Pi 5 over an hour, with and without a policy
- quality.svg: divergence from the original model by megabytes a token, from results/kl-divergence.json
- slices.svg: how one weight is stored, and what each depth reads

The same inputs give the same bytes with the same version of matplotlib.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from mbq_runtime.simulate.boards import find_board
from mbq_runtime.simulate.closed_loop import contenders, simulate
from mbq_runtime.simulate.model import SMOLLM2_135M

ROOT = Path(__file__).resolve().parents[2]
DEMAND_TOKENS_PER_S = 20.0
FIXED, FOLLOWING, RIVAL = "tab:red", "tab:blue", "tab:gray"


def heat() -> Figure:
    """Draw one hour of a bare Raspberry Pi 5 at 20 tokens/s: temperature above, budget below."""
    board, weights = find_board("pi5-bare"), SMOLLM2_135M
    named = contenders(("fixed 8", "auto"), weights.low_bits, weights.high_bits)
    runs = [simulate(board, weights, name, policy, hours=1.0, demand_tps=DEMAND_TOKENS_PER_S) for name, policy in named]
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    temperature, budget = figure.subplots(2, sharex=True)
    for run, colour in zip(runs, (FIXED, FOLLOWING), strict=True):
        minutes = [sample.time_s / 60 for sample in run.samples]
        # Each point of the temperature is a mean over a minute: the sensor's noise would hide the curve.
        temps = [sample.temp_c or 0.0 for sample in run.samples]
        means = [sum(temps[i : i + 60]) / len(temps[i : i + 60]) for i in range(0, len(temps), 60)]
        temperature.plot(range(len(means)), means, color=colour, label=run.name)
        budget.step(minutes, [sample.bits for sample in run.samples], color=colour, where="post")
    temperature.axhline(board.throttle_c, color="black", linestyle=":", linewidth=1)
    temperature.annotate("throttle point", (0, board.throttle_c), (2, 3), textcoords="offset points", fontsize="small")
    temperature.set(ylabel="temperature, °C", ylim=(32, 88))
    temperature.legend(loc="lower right")
    budget.set(ylabel="budget, bits a weight", xlabel="minutes", ylim=(3.5, 8.5))
    temperature.set_title("Raspberry Pi 5 without a cooler, 20 tokens/s asked for (simulated)")
    for axis in (temperature, budget):
        axis.grid(alpha=0.3)
    return figure


def quality() -> Figure:
    """Draw the mean KL divergence from the original by megabytes a token: a bundle beside llama.cpp files."""
    text = (ROOT / "results" / "kl-divergence.json").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = json.loads(text)["rows"]
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for kind, colour in (("bundle", FOLLOWING), ("llama.cpp", RIVAL)):
        points = sorted((row["mb_per_token"], row["mean_kl_nats"], row["file"]) for row in rows if row["kind"] == kind)
        line = "-" if kind == "bundle" else ""
        label = "one bundle, by budget" if kind == "bundle" else "llama.cpp, one file each"
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o" + line, color=colour, label=label)
        for x, y, name in points:
            short = name.removeprefix("bundle, ").removeprefix("llama.cpp ")
            axes.annotate(
                short,
                (x, y),
                (5, -13 if kind == "bundle" else 5),
                textcoords="offset points",
                fontsize="small",
                color=colour,
            )
    axes.set(
        xlabel="megabytes of weights a token reads", ylabel="mean KL to float32, nats", yscale="log", xlim=(50, 155)
    )
    axes.set_title("SmolLM2-135M, mean of five texts (lower is closer to the original)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def slices() -> Figure:
    """Draw an 8-bit code cut into slices of 3, 1, 2 and 2 bits, and what each depth reads."""
    widths, shades = (3, 1, 2, 2), ("#08519c", "#3182bd", "#6baed6", "#bdd7e7")
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.add_subplot()
    for depth in range(1, len(widths) + 1):
        left, bits = 0, sum(widths[:depth])
        for i, width in enumerate(widths):
            kept = i < depth
            colour = shades[i] if kept else "white"
            axes.barh(-depth, width, left=left, color=colour, edgecolor="black", height=0.7)
            if kept:
                plural = "bits" if width > 1 else "bit"
                axes.text(left + width / 2, -depth, f"slice {i + 1}\n{width} {plural}", ha="center", va="center",
                          fontsize=7, color="white" if i < 2 else "black")  # fmt: skip
            left += width
        axes.text(-0.1, -depth, f"depth {depth}", ha="right", va="center")
        axes.text(8.1, -depth, f"{bits} bits read", ha="left", va="center")
    axes.set(xlim=(-1.2, 9.8), ylim=(-4.6, -0.4))
    axes.set_title("One weight is one 8-bit code. A depth reads its first slices.", fontsize=10)
    axes.axis("off")
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {"heat": heat, "quality": quality, "slices": slices}


def main() -> None:
    """Write every figure as an SVG file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder; default: beside this script")
    out = parser.parse_args().out
    # Fixed names inside the file and no date: the same figure gives the same bytes.
    with rc_context({"svg.hashsalt": "mbq", "svg.fonttype": "none", "font.family": "sans-serif"}):
        for name, draw in FIGURES.items():
            draw().savefig(out / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
