"""The table of boards: reports of ``mbq kit`` become measured rows of results/boards.json, beside the estimates.

    python tests/benchmarks/boards.py report.json [report2.json ...]

Without a report the rows of the simulated boards are written again.  A new row of the same board and bundle as an
earlier one replaces it.
"""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from mbq_runtime.simulate.boards import BOARDS, Board
from mbq_runtime.simulate.closed_loop import contenders
from mbq_runtime.simulate.compared import Trial
from mbq_runtime.simulate.model import SMOLLM2_135M, Weights, token_s
from mbq_runtime.simulate.report import read_report

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "boards.json"


def row(board: Board, weights: Weights, origin: str, model: str) -> dict[str, Any]:
    """The figures of a board at its highest and its lowest budget, without pause, cool."""
    ceiling, floor = (1 / token_s(board, weights, bits, 1.0) for bits in (weights.high_bits, weights.low_bits))
    busy_w = board.idle_w + board.core_w
    return {
        "board": board.help,
        "origin": origin,
        "model": model,
        "ceiling_tokens_per_s": round(ceiling, 1),
        "floor_bits": weights.low_bits,
        "floor_tokens_per_s": round(floor, 1),
        "busy_w": round(busy_w, 2) if busy_w else None,
        "ceiling_joules_per_token": round(busy_w / ceiling, 4) if busy_w else None,
        "tau_s": round(board.tau_s) if board.k_per_w else None,
        "measured_tokens_per_s": None,
        "simulated_tokens_per_s": None,
        "measured_bits": None,
        "simulated_bits": None,
    }


def measured(path: Path) -> dict[str, Any]:
    """A row of a report, with its closed loop beside the simulation of it."""
    report = read_report(path)
    weights = report.weights
    trial = Trial(report.situation, weights, report.board)
    ((name, auto),) = contenders(["auto"], weights.low_bits, weights.high_bits)
    figures = trial.run(name, trial.follow(auto)).figures()
    facts = json.loads(path.read_text(encoding="utf-8"))["bundle"]
    found = row(report.board, weights, "measured", f"{facts['model']}, {facts['target']}")
    return found | {
        "measured_tokens_per_s": round(report.tokens_per_s, 1),
        "simulated_tokens_per_s": round(figures["tokens_per_s"] or 0.0, 1),
        "measured_bits": round(report.mean_bits, 2),
        "simulated_bits": round(figures["mean_bits"] or 0.0, 2),
    }


@click.command()
@click.argument("reports", nargs=-1, type=click.Path(path_type=Path, exists=True))
def main(reports: tuple[Path, ...]) -> None:
    earlier = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.exists() else []
    new = [measured(path) for path in reports]
    for one in new:
        click.echo(json.dumps(one))
    replaced = {(one["board"], one["model"]) for one in new}
    kept = [old for old in earlier if old["origin"] == "measured" and (old["board"], old["model"]) not in replaced]
    estimates = [row(board, SMOLLM2_135M, "estimate", "smollm2-135m") for board in BOARDS.values()]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
    document = {
        "title": "Boards: measured by mbq kit, and the estimates of the simulation",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": "by row",
        "commit": commit,
        "published_in": None,
        "command": "python tests/benchmarks/boards.py report.json",
        "notes": [
            "An estimate is a row of runtime/mbq_runtime/simulate/boards.py; no board has confirmed it.",
            "The closed loop of a measured row: the policy auto, with one core taken in the middle third.",
        ],
        "rows": [*new, *kept, *estimates],
    }
    RESULTS.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
