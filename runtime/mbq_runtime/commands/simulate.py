"""``mbq simulate``"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import click

from mbq_runtime import plotting, tables
from mbq_runtime.errors import UsageError
from mbq_runtime.printable import printable

from .common import FiniteRange, json_option

_CONTENDERS = ("fixed 8", "fixed 4", "auto", "battery")
_ORACLE = "oracle"

_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("tokens_per_s", "tokens/s", ".1f"),
    ("mean_bits", "mean bits", ".2f"),
    ("joules_per_token", "J/token", ".3f"),
    ("above_throttle_share", "throttled", ".0%"),
    ("hottest_c", "hottest C", ".1f"),
    ("switches", "switches", "d"),
)
"""(figure, heading, form)"""
_COMPARED: tuple[tuple[str, str, str], ...] = (
    ("kl_seconds", "quality given, nat s", ".1f"),
    ("missed_s", "goal missed, s", "d"),
)
"""Columns of simulated boards, which have an oracle."""


@click.command("simulate")
@click.argument("what", metavar="BOARD|SITUATION|TRACE|REPORT")
@click.option(
    "--policy", "policies", multiple=True, metavar="NAME", help='As "auto", "fixed 4" or "oracle"; may be repeated.'
)
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Take sizes and budgets from this bundle.  [default: SmolLM2-135M]",
)
@click.option("--hours", type=FiniteRange(0.01, 100), default=1.0, help="How long a board decodes.")
@click.option("--demand", type=FiniteRange(0.01), help="Tokens/s that are asked for.  [default: without pause]")
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
    """Compare policies on a modelled BOARD, in a SITUATION, or on a TRACE of readings.

    Boards: pi5-bare, pi5-fan, orin-nano-15w, phone, laptop-battery.  Their parameters are estimates for
    the most part: they show how policies differ, not how fast a board is.  A situation is a board and what
    happens around it, such as pi-compile; "mbq simulate list" shows them.  The oracle knows the board and
    the future.  A report is the file of "mbq kit".  A trace is what "mbq sense --json --watch > trace.jsonl" wrote.
    """
    from mbq_runtime.bundle import manifest
    from mbq_runtime.simulate.closed_loop import contenders
    from mbq_runtime.simulate.model import SMOLLM2_135M, Weights
    from mbq_runtime.simulate.plot import draw
    from mbq_runtime.simulate.replay import read_trace, replay
    from mbq_runtime.simulate.report import is_report, read_report
    from mbq_runtime.simulate.situations import SITUATIONS, find_situation

    if plot is not None:
        plotting.check(plot)

    if what == "list":
        rows = ([row.name, row.board, row.help] for row in SITUATIONS.values())
        click.echo(tables.aligned(["situation", "board", ""], rows, words=["situation", "board", ""]))
        return
    weights = SMOLLM2_135M if bundle is None else Weights.of(manifest.read(bundle))
    names = [name for name in policies or _CONTENDERS if name != _ORACLE]
    named = contenders(names, weights.low_bits, weights.high_bits)
    compared: dict[str, dict[str, float | None]] = {}
    is_file = os.path.isfile(what)  # a name that no file can have is none
    reported = read_report(Path(what)) if is_file and is_report(Path(what)) else None
    if reported is not None:
        weights = reported.weights
        named = contenders(names, weights.low_bits, weights.high_bits)
    if is_file and reported is None:
        if _ORACLE in policies:
            raise UsageError(f"--policy {_ORACLE}: it must know the board, and {what} has readings alone; leave it out")
        trace = read_trace(Path(what))
        runs = [replay(trace, name, policy) for name, policy in named]
        title, limits_c = what, sorted({r.throttle_temp_c for r in trace if r.throttle_temp_c is not None})
    else:
        from mbq_runtime.simulate.compared import Trial

        if reported is None:
            trial = Trial(find_situation(what, hours, demand), weights)
        else:
            trial = Trial(reported.situation, weights, reported.board)
        runs = [trial.run(name, trial.follow(policy)) for name, policy in named]
        if not policies or _ORACLE in policies:
            runs.append(trial.oracle())
        title, limits_c = f"{what}: {trial.situation.help}", [trial.board.throttle_c, trial.board.hard_c]
        compared = {run.name: asdict(trial.figures(run)) for run in runs}
    if plot is not None:
        draw(runs, title, limits_c, plot)
    figures = {run.name: run.figures() | compared.get(run.name, {}) for run in runs}
    if reported is not None:
        unknown = dict.fromkeys(figures[runs[0].name])
        figures["measured"] = unknown | {"tokens_per_s": reported.tokens_per_s, "mean_bits": reported.mean_bits}
    if as_json:
        click.echo(json.dumps({"what": title, "runs": figures}))
        return
    click.echo(f"{printable(title)}\n{_table(figures, _COLUMNS + _COMPARED if compared else _COLUMNS)}")


def _table(figures: Mapping[str, Mapping[str, float | None]], columns: Sequence[tuple[str, str, str]]) -> str:
    rows = [[run, *(_cell(of[name], form) for name, _, form in columns)] for run, of in figures.items()]
    return tables.aligned(["policy", *(heading for _, heading, _ in columns)], rows, words=["policy"])


def _cell(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)
