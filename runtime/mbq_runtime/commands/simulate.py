"""``mbq simulate``"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mbq_runtime import tables

from .common import json_option

if TYPE_CHECKING:
    from mbq_runtime.simulate.closed_loop import PolicyRun

_CONTENDERS = ("fixed 8", "fixed 4", "auto", "battery")

_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("tokens_per_s", "tokens/s", ".1f"),
    ("mean_bits", "mean bits", ".2f"),
    ("joules_per_token", "J/token", ".3f"),
    ("above_throttle_share", "throttled", ".0%"),
    ("hottest_c", "hottest C", ".1f"),
    ("switches", "switches", "d"),
)
"""(figure, heading, form)"""


@click.command("simulate")
@click.argument("what", metavar="BOARD|TRACE")
@click.option("--policy", "policies", multiple=True, metavar="NAME", help='As "auto" or "fixed 4"; may be repeated.')
@click.option(
    "--bundle", type=click.Path(path_type=Path), help="Take sizes and budgets from it.  [default: SmolLM2-135M]"
)
@click.option("--hours", type=click.FloatRange(0.01, 100), default=1.0, help="How long a board decodes.")
@click.option("--demand", type=click.FloatRange(0.01), help="Tokens/s that are asked for.  [default: without pause]")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw temperature, budget and speed: .png, .svg or .pdf.")
@json_option
def command(
    what: str,
    policies: Sequence[str],
    bundle: Path | None,
    hours: float,
    demand: float | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Compare policies on a modelled BOARD, or on a TRACE of readings.

    Boards: pi5-bare, pi5-fan, orin-nano-15w, phone, laptop-battery.  Their parameters are estimates for
    the most part: they show how policies differ, not how fast a board is.  A trace is what
    "mbq sense --json --watch > trace.jsonl" wrote.
    """
    from mbq_runtime.bundle import manifest
    from mbq_runtime.simulate.boards import find_board
    from mbq_runtime.simulate.closed_loop import contenders, simulate
    from mbq_runtime.simulate.model import SMOLLM2_135M, Weights
    from mbq_runtime.simulate.plot import draw
    from mbq_runtime.simulate.replay import read_trace, replay

    weights = SMOLLM2_135M if bundle is None else Weights.of(manifest.read(bundle))
    named = contenders(policies or _CONTENDERS, weights.low_bits, weights.high_bits)
    if Path(what).is_file():
        trace = read_trace(Path(what))
        runs = [replay(trace, name, policy) for name, policy in named]
        title, limits_c = what, sorted({r.throttle_temp_c for r in trace if r.throttle_temp_c is not None})
    else:
        board = find_board(what)
        runs = [simulate(board, weights, name, policy, hours=hours, demand_tps=demand) for name, policy in named]
        title, limits_c = f"{board.name}: {board.help}", [board.throttle_c, board.hard_c]
    if plot is not None:
        draw(runs, title, limits_c, plot)
    if as_json:
        click.echo(json.dumps({"what": title, "runs": {run.name: run.figures() for run in runs}}))
        return
    click.echo(f"{title}\n{_table(runs)}")


def _table(runs: Sequence[PolicyRun]) -> str:
    rows = []
    for run in runs:
        figures = run.figures()
        rows.append([run.name, *(_cell(figures[name], form) for name, _, form in _COLUMNS)])
    return tables.aligned(["policy", *(heading for _, heading, _ in _COLUMNS)], rows, words=["policy"])


def _cell(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)
