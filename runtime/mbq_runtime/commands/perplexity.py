"""``mbq perplexity``"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click

from mbq_runtime import tables
from mbq_runtime.bundle.manifest import Budget
from mbq_runtime.errors import UsageError

from .common import bundle_argument, engine_option, json_option, listed, progress_line, threads_option


@click.command("perplexity")
@bundle_argument
@click.option("--data", type=click.Path(path_type=Path), required=True, help="UTF-8 text to predict.")
@click.option("--bits", help="Budgets, such as 3,4,6,8.  [default: every whole number the bundle takes]")
@click.option("--context", type=int, default=512, help="Tokens in a window.")
@click.option("--max-windows", type=int, help="Use this many windows, spread over the text.  [default: all]")
@click.option(
    "--hold-bits",
    is_flag=True,
    help="Correct the budget from window to window, so that the bits used hold it, as a governor does for tokens.",
)
@click.option("--reference", metavar="MODEL", help="Measure this original model too (needs mbq-export[export]).")
@engine_option
@threads_option
@json_option
def command(
    bundle: Path,
    data: Path,
    bits: str | None,
    context: int,
    max_windows: int | None,
    hold_bits: bool,
    reference: str | None,
    engine: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure how well the bundle in folder BUNDLE predicts a text, at several budgets.

    The windows have --context tokens each and do not overlap.  +- is the standard error over windows.
    """
    from mbq_runtime import perplexity
    from mbq_runtime.bundle import manifest

    # Refuse bad arguments before the long work.
    text = perplexity.read_text(data)
    budget = manifest.read(bundle).budget
    budgets = (
        [budget.check(value, str(bundle)) for value in listed("--bits", bits, float)]
        if bits
        else _whole_budgets(budget)
    )
    reference_nll = perplexity.load_reference() if reference else None

    from mbq_runtime.engine import Engine

    loaded = Engine.load(bundle, threads=threads, engine=engine)
    if context > loaded.context_length:
        raise UsageError(f"--context {context}: {bundle} takes at most {loaded.context_length} tokens")
    windows = perplexity.cut_windows(loaded.encode(text), context, loaded.opening_tokens, max_windows)

    rows = []
    for value in budgets:
        score = perplexity.held(loaded.score, value, budget) if hold_bits else partial(loaded.score, avg_bits=value)
        with progress_line(f"scoring at {value:g} bits") as progress:
            rows.append(perplexity.measure(windows, value, score, progress))
    reference_ppl: perplexity.Estimate | None = None
    if reference and reference_nll:
        with progress_line(f"scoring {reference}") as progress:
            reference_ppl = perplexity.estimate(reference_nll(reference, windows, progress))
    if as_json:
        result = {
            "context": context,
            "windows": len(windows),
            "reference_ppl": reference_ppl.ppl if reference_ppl else None,
            "rows": [asdict(row) for row in rows],
        }
        click.echo(json.dumps(result))
        return
    click.echo(f"{len(windows)} windows of {context} tokens from {data}")
    lines = [(f"{row.bits:.2f}", f"{row.avg_bits_used:.3f}", *_figures(row.ppl, row.ppl_stderr)) for row in rows]
    if reference_ppl:
        lines.append(("reference", "", *_figures(reference_ppl.ppl, reference_ppl.ppl_stderr)))
    click.echo(tables.aligned(("bits", "bits used", "perplexity", "+-"), lines))


def _figures(ppl: float, stderr: float | None) -> tuple[str, str]:
    return f"{ppl:.3f}", "unknown" if stderr is None else f"{stderr:.3f}"


def _whole_budgets(budget: Budget) -> list[float]:
    low, high = budget.min_bits, budget.max_bits
    return [float(bits) for bits in range(math.ceil(low), math.floor(high) + 1)] or [low]
