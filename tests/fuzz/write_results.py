"""Writes a row of results/fuzz.json from the files that long runs kept.

    python tests/fuzz/write_results.py bundles one.json two.json

A row with the same input and commit is replaced.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "results" / "fuzz.json"
TOOLS = {
    "bundles": "bundle_attempts.py --cases 10000",
    "checkpoints and options": "attempts.py --cases 2000",
    "requests": "request_attempts.py --cases 5000",
    "exports that a signal ends": "kill_attempts.py --cases 130",
}
"""What was changed, and the tool with its usual number of cases."""

_FROM = "PYTHONPATH=tests:tests/export:tests/runtime:tests/attacks python tests/fuzz/"


def row(what: str, kept: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the table.

    Args:
        what: a key of ``TOOLS``.
        kept: sums of one or more runs, see ``kept.Sums``.
    """

    def total(field: str) -> int | None:
        found = [sums[field] for sums in kept if field in sums]
        return sum(sum(one.values()) if isinstance(one, dict) else one for one in found) if found else None

    for sums in kept:
        if "statuses" in sums:  # 100: the server waits for a body that does not come
            taken = {status: number for status, number in sums["statuses"].items() if status in ("100", "200")}
            sums |= {"accepted": taken, "refused": sum(sums["statuses"].values()) - sum(taken.values())}
    commits = sorted({commit for sums in kept for commit in sums["cases"]})
    assert len(commits) == 1, f"cases of several commits: {commits}"
    return {
        "input": what,
        "cases": total("cases"),
        "refused": total("refused"),
        "accepted": total("accepted"),
        "undecided": total("undecided"),
        "faults": sum(len(sums["faults"]) for sums in kept),
        "slowest_refusal_s": max((round(sums["slowest_s"], 1) for sums in kept if "slowest_s" in sums), default=None),
        "processor_s": round(sum(sums["processor_s"] for sums in kept)),
        "commit": commits[0],
        "command": f"{_FROM}{TOOLS[what]}",
    }


def main() -> None:
    """Replace or add a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=TOOLS, help="what was changed")
    parser.add_argument("files", nargs="+", type=Path, help="files of --keep")
    options = parser.parse_args()
    made = row(options.what, [json.loads(path.read_text(encoding="utf-8")) for path in options.files])
    document = json.loads(RESULTS.read_text(encoding="utf-8"))
    same = [(one["input"], one["commit"]) != (made["input"], made["commit"]) for one in document["rows"]]
    rows = [one for one, other in zip(document["rows"], same, strict=True) if other]
    document |= {"date": datetime.date.today().isoformat(), "rows": sorted([*rows, made], key=lambda one: one["input"])}
    RESULTS.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
