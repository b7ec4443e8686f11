"""``mbq perplexity``"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mbq_runtime import tables
from mbq_runtime.bundle.facts import Budget
from mbq_runtime.errors import UsageError

from .common import bundle_argument, engine_option, json_option, listed, progress_line, threads_option
from .trust import note_code, trust_option

if TYPE_CHECKING:
    from mbq_runtime.fidelity import TokenFidelity
    from mbq_runtime.perplexity import Estimate, PerplexityResult


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
@click.option(
    "--reference",
    metavar="MODEL",
    help="Measure this original model too, and KL divergence from it (needs mbq-export[export]).",
)
@engine_option
@trust_option
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
    trust: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure how well BUNDLE predicts a text, at several budgets.

    The windows have --context tokens each and do not overlap.  +- is the standard error over windows.  With
    --reference, KL is the divergence of the bundle from the original in nats a token: mean, 99 % and 99.9 % of tokens.
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
    load_logits = perplexity.load_reference() if reference else None

    from mbq_runtime.engine import Engine

    note_code(bundle, trust=trust)
    loaded = Engine.load(bundle, threads=threads, engine=engine)
    if context > loaded.context_length:
        raise UsageError(f"--context {context}: {bundle} takes at most {loaded.context_length} tokens")
    windows = perplexity.cut_windows(loaded.encode(text), context, loaded.opening_tokens, max_windows)

    rows: Sequence[PerplexityResult]
    reference_ppl: Estimate | None = None
    if reference and load_logits:
        with progress_line(f"loading {reference}"):
            original = perplexity.last_kept(load_logits(reference))

        def against(window: Sequence[int], avg_bits: float) -> tuple[TokenFidelity, float]:
            return loaded.score_against(window, avg_bits, original(window))

        scorers = [
            (value, perplexity.held(against, value, budget) if hold_bits else partial(against, avg_bits=value))
            for value in budgets
        ]
        with progress_line(f"scoring beside {reference}") as progress:
            reference_ppl, rows = perplexity.measure_against(windows, scorers, original, progress)
    else:
        rows = []
        for value in budgets:
            score = perplexity.held(loaded.score, value, budget) if hold_bits else partial(loaded.score, avg_bits=value)
            with progress_line(f"scoring at {value:g} bits") as progress:
                rows.append(perplexity.measure(windows, value, score, progress))
    if as_json:
        ppl = reference_ppl.ppl if reference_ppl else None
        result = {"context": context, "windows": len(windows), "reference_ppl": ppl, "rows": [*map(asdict, rows)]}
        click.echo(json.dumps(result))
    else:
        click.echo(f"{len(windows)} windows of {context} tokens from {data}\n{_table(rows, reference_ppl)}")


_HEADINGS = ("bits", "bits used", "perplexity", "+-")
_REFERENCE_HEADINGS = ("ratio", "+-", "KL, nats", "+-", "99 % KL", "99.9 % KL", "same top", "+-")


def _table(rows: Sequence[PerplexityResult], reference_ppl: Estimate | None) -> str:
    lines, headings = [_cells(row) for row in rows], [*_HEADINGS]
    if reference_ppl:
        headings += _REFERENCE_HEADINGS
        nothing = [""] * len(_REFERENCE_HEADINGS)
        lines.append(["reference", "", *_figures(reference_ppl.ppl, reference_ppl.ppl_stderr), *nothing])
    return tables.aligned(headings, lines)


def _cells(row: PerplexityResult) -> list[str]:
    from mbq_runtime.perplexity import ReferencedResult

    cells = [f"{row.bits:.2f}", f"{row.avg_bits_used:.3f}", *_figures(row.ppl, row.ppl_stderr)]
    if isinstance(row, ReferencedResult):
        cells += _figures(row.ppl_ratio, row.ppl_ratio_stderr)
        cells += _figures(row.kl, row.kl_stderr, 4)
        cells += [f"{row.kl_p99:.4f}", f"{row.kl_p999:.4f}"]
        cells += _figures(row.same_top, row.same_top_stderr)
    return cells


def _figures(value: float, stderr: float | None, digits: int = 3) -> tuple[str, str]:
    return f"{value:.{digits}f}", "unknown" if stderr is None else f"{stderr:.{digits}f}"


def _whole_budgets(budget: Budget) -> list[float]:
    low, high = budget.min_bits, budget.max_bits
    return [float(bits) for bits in range(math.ceil(low), math.floor(high) + 1)] or [low]
