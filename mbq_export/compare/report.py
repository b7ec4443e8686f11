"""The figures of a comparison: rows, duels, and both as JSON and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mbq_runtime import tables

from .harness import Mean, Scores, Side, mean


@dataclass(frozen=True)
class Row:
    """One side on one text.

    method, name, bits, linear_bytes, block_bytes, head: see ``harness.Side``; bits_used: average bits used;
    ppl: perplexity; over_fp: perplexity over the float32 model's; divergence: from the float32 model, in nats;
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
        return cls(
            side.method,
            side.name,
            side.bits,
            used,
            scores.ppl,
            scores.ppl_over(reference),
            mean(scores.divergence),
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
    bytes_ratio: the bundle's bytes per token over the rival's.
    """

    bundle: str
    rival: str
    ppl_ratio: Mean
    bytes_ratio: float

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
            Duel(us.name, them.name, us.scores.ppl_over(them.scores), us.linear_bytes / them.linear_bytes)
            for us in ours
            for them in rivals
            if (them.bits == us.bits if them.bits is not None else them.linear_bytes <= us.linear_bytes)
        ]


def document(results: Sequence[TextResult], facts: dict[str, Any]) -> dict[str, Any]:
    """All figures, for JSON.

    Args:
        results: one per text.
        facts: about the run; they are put first.
    """
    return {
        **facts,
        "texts": [
            {
                "name": result.name,
                "windows": result.windows,
                "rows": [asdict(row) for row in result.rows],
                "duels": [{**asdict(duel), "verdict": duel.verdict} for duel in result.duels],
            }
            for result in results
        ],
    }


def markdown(results: Sequence[TextResult], linear_weights: int, block_weights: int) -> str:
    """Two tables for each text.

    Args:
        results: one per text.
        linear_weights: number of weights in all linear layers.
        block_weights: the same without the head.
    """
    parts = []
    for result in results:
        tasks = sorted({task for row in result.rows for task in row.zero_shot})
        rows = [_cells(row, linear_weights, block_weights, tasks) for row in result.rows]
        parts.append(f"### {result.name}, {result.windows} windows\n")
        parts.append(tables.markdown(_HEADINGS + tasks, rows, words=("side", "head")))
        if result.duels:
            parts.append("\nPerplexity of the bundle over that of a rival of as many bits, or of no more bytes:\n")
            cells = [
                [d.bundle, d.rival, _figure(d.ppl_ratio, 3), f"{d.bytes_ratio:.2f}x", d.verdict] for d in result.duels
            ]
            parts.append(tables.markdown(_DUEL_HEADINGS, cells, words=("bundle", "rival", "the bundle is")))
    return "\n".join(parts)


_HEADINGS = [
    "side", "bits used", "perplexity", "over fp32", "KL, nats", "top-1 agreement", "last word", "MB a token",
    "bits a weight", "in blocks", "head",
]  # fmt: skip
_DUEL_HEADINGS = ["bundle", "rival", "ratio", "bytes", "the bundle is"]


def _cells(row: Row, linear_weights: int, block_weights: int, tasks: Sequence[str]) -> list[str]:
    return [
        row.name,
        f"{row.bits_used:.2f}",
        _figure(row.ppl, 3),
        _figure(row.over_fp, 3),
        _figure(row.divergence, 4),
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
