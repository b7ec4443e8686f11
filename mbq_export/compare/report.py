"""The figures of a comparison: rows, duels, and both as JSON and as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mbq_runtime import fidelity, tables
from mbq_runtime.fidelity import Mean, mean

from .harness import Scores, Side


@dataclass(frozen=True)
class Row:
    """One side on one text, or on all of them.

    method, name, bits, linear_bytes, block_bytes, head: see ``harness.Side``; bits_used: average bits used;
    ppl: perplexity; over_fp: perplexity over the float32 model's; divergence: from the float32 model, in nats
    a token; divergence_p99, divergence_p999: 99 % and 99.9 % of the tokens diverge less;
    agreement: share of positions with the same most likely token; last_word: accuracy, or None without passages;
    zero_shot: lm-eval's figures by task and metric; scores: of every window, so that any two rows can be paired.
    """

    method: str
    name: str
    bits: float | None
    bits_used: float
    ppl: Mean
    over_fp: Mean
    divergence: Mean
    divergence_p99: float
    divergence_p999: float
    agreement: Mean
    last_word: Mean | None
    zero_shot: dict[str, float]
    linear_bytes: int
    block_bytes: int | None
    head: str
    scores: Scores

    @classmethod
    def of(
        cls, side: Side, scores: Scores, reference: Scores, last_word: Mean | None, zero_shot: dict[str, float]
    ) -> Row:
        """The row of a side.

        Args:
            side: what was measured.
            scores: its scores.
            reference: the float32 model's scores on the same windows.
            last_word: accuracy, or None without passages.
            zero_shot: lm-eval's figures by task and metric.
        """
        used = mean(scores.bits).value
        divergence = fidelity.divergence(scores.token_divergence)
        return cls(
            side.method,
            side.name,
            side.bits,
            used,
            scores.ppl,
            scores.ppl_over(reference),
            divergence.mean,
            divergence.p99,
            divergence.p999,
            mean(scores.agreement),
            last_word,
            zero_shot,
            side.linear_bytes(used),
            side.block_bytes,
            side.head,
            scores,
        )


@dataclass(frozen=True)
class Duel:
    """A budget of the bundle against a rival.

    bundle, rival: names of the two sides; ppl_ratio: the bundle's perplexity over the rival's, with paired windows;
    bytes_ratio: the bundle's bytes per token over the rival's; divergence_gap: the bundle's KL divergence less the
    rival's in nats a token, with paired windows.
    """

    bundle: str
    rival: str
    ppl_ratio: Mean
    bytes_ratio: float
    divergence_gap: Mean

    @property
    def verdict(self) -> str:
        """What the ratio says beyond one standard error."""
        off = self.ppl_ratio.value - 1
        if self.ppl_ratio.stderr is None or abs(off) <= self.ppl_ratio.stderr:
            return "undecided"
        return "better" if off < 0 else "worse"


@dataclass(frozen=True)
class TextResult:
    """All sides on one text.

    name: the text's name; windows: how many were measured; rows: one per side.
    """

    name: str
    windows: int
    rows: list[Row]

    @property
    def duels(self) -> list[Duel]:
        """Each budget of the bundle against the rivals of as many bits, and the files of no more bytes."""
        ours = [row for row in self.rows if row.method == "bundle"]
        rivals = [row for row in self.rows if row.method not in ("bundle", "fp32")]
        return [
            Duel(
                us.name,
                them.name,
                us.scores.ppl_over(them.scores),
                us.linear_bytes / them.linear_bytes,
                us.scores.divergence_less(them.scores),
            )
            for us in ours
            for them in rivals
            if (them.bits == us.bits if them.bits is not None else them.linear_bytes <= us.linear_bytes)
        ]


def mean_over(results: Sequence[TextResult]) -> TextResult:
    """All sides on all texts together.

    Every text has the same number of windows, so every text has the same weight.  Percentiles are over the tokens of
    all texts.  A ratio of perplexities is the geometric mean of the texts' ratios.

    Args:
        results: one per text, of the same sides in the same order; at least one.
    """
    sides = [_mean_row(rows) for rows in zip(*(result.rows for result in results), strict=True)]
    return TextResult(f"mean of {len(results)} texts", sum(result.windows for result in results), sides)


def _mean_row(rows: Sequence[Row]) -> Row:
    """The row of one side, from its rows on each text."""
    scores = _joined([row.scores for row in rows])
    divergence = fidelity.divergence(scores.token_divergence)
    return replace(
        rows[0],
        bits_used=mean(scores.bits).value,
        ppl=scores.ppl,
        over_fp=_geometric_mean([row.over_fp for row in rows]),
        divergence=Mean(divergence.mean.value, _mean_stderr([row.divergence.stderr for row in rows])),
        divergence_p99=divergence.p99,
        divergence_p999=divergence.p999,
        agreement=Mean(mean(scores.agreement).value, _mean_stderr([row.agreement.stderr for row in rows])),
        last_word=None,
        linear_bytes=round(mean([row.linear_bytes for row in rows]).value),
        scores=scores,
    )


def _joined(parts: Sequence[Scores]) -> Scores:
    return Scores(
        [v for part in parts for v in part.nll],
        [v for part in parts for v in part.divergence],
        [v for part in parts for v in part.agreement],
        [v for part in parts for v in part.bits],
        [v for part in parts for v in part.token_divergence],
    )


def _geometric_mean(ratios: Sequence[Mean]) -> Mean:
    """The geometric mean of ratios of different texts, with the error of their logarithms."""
    value = math.exp(mean([math.log(ratio.value) for ratio in ratios]).value)
    relative = [None if ratio.stderr is None else ratio.stderr / ratio.value for ratio in ratios]
    stderr = _mean_stderr(relative)
    return Mean(value, None if stderr is None else value * stderr)


def _mean_stderr(errors: Sequence[float | None]) -> float | None:
    """The standard error of the mean over texts.  The texts are given, so only their own errors count."""
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(known) if len(known) == len(errors) else None


def document(results: Sequence[TextResult], facts: dict[str, Any]) -> dict[str, Any]:
    """All figures, for JSON.

    Args:
        results: one per text.
        facts: about the run; they are put first.
    """
    found = {**facts, "texts": [_result(result) for result in results]}
    if len(results) > 1:
        found["mean"] = _result(mean_over(results))
    return found


def _result(result: TextResult) -> dict[str, Any]:
    rows = [asdict(row) for row in result.rows]
    for row in rows:
        del row["scores"]["token_divergence"]  # thousands of numbers a row; the percentiles stay
    duels = [{**asdict(duel), "verdict": duel.verdict} for duel in result.duels]
    return {"name": result.name, "windows": result.windows, "rows": rows, "duels": duels}


def markdown(results: Sequence[TextResult], linear_weights: int, block_weights: int) -> str:
    """Two tables for each text, and for the mean over texts.

    Args:
        results: one per text.
        linear_weights: number of weights in all linear layers that a token reads.
        block_weights: the same without the head.
    """
    parts = []
    for result in [*results, mean_over(results)] if len(results) > 1 else results:
        tasks = sorted({task for row in result.rows for task in row.zero_shot})
        rows = [_cells(row, linear_weights, block_weights, tasks) for row in result.rows]
        parts.append(f"### {result.name}, {result.windows} windows\n")
        parts.append(tables.markdown(_HEADINGS + tasks, rows, words=("side", "head")))
        if result.duels:
            parts.append("\nPerplexity of the bundle over that of a rival of as many bits, or of no more bytes:\n")
            cells = [
                [
                    d.bundle,
                    d.rival,
                    _figure(d.ppl_ratio, 3),
                    f"{d.bytes_ratio:.2f}x",
                    d.verdict,
                    _figure(d.divergence_gap, 4),
                ]
                for d in result.duels
            ]
            parts.append(tables.markdown(_DUEL_HEADINGS, cells, words=("bundle", "rival", "the bundle is")))
    return "\n".join(parts)


_HEADINGS = [
    "side", "bits used", "perplexity", "over fp32", "KL, nats", "99 % KL", "99.9 % KL", "same top", "last word",
    "MB a token", "bits a weight", "in blocks", "head",
]  # fmt: skip
_DUEL_HEADINGS = ["bundle", "rival", "ratio", "bytes", "the bundle is", "KL less rival's, nats"]


def _cells(row: Row, linear_weights: int, block_weights: int, tasks: Sequence[str]) -> list[str]:
    return [
        row.name,
        f"{row.bits_used:.2f}",
        _figure(row.ppl, 3),
        _figure(row.over_fp, 3),
        _figure(row.divergence, 4),
        f"{row.divergence_p99:.4f}",
        f"{row.divergence_p999:.4f}",
        _figure(row.agreement, 3),
        "" if row.last_word is None else _figure(row.last_word, 3),
        f"{row.linear_bytes / 1e6:.1f}",
        f"{8 * row.linear_bytes / linear_weights:.2f}",
        "" if row.block_bytes is None else f"{8 * row.block_bytes / block_weights:.2f}",
        row.head,
        *(f"{row.zero_shot[task]:.3f}" if task in row.zero_shot else "" for task in tasks),
    ]


def _figure(value: Mean, digits: int) -> str:
    shown = f"{value.value:.{digits}f}"
    return shown if value.stderr is None else f"{shown} ± {value.stderr:.{digits}f}"
