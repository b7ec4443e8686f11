"""Put a comparison into results/kl-divergence.json, or into another file of such rows.

    mbq-export compare ... --output OUT
    python docs/kl_rows.py OUT/results.json --commit COMMIT --machine MACHINE --date DAY

Rows of the same files are replaced.  A row that the comparison does not have stays, with its own commit and machine.
``docs/tables.py`` makes the tables afterwards.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results" / "kl-divergence.json"
TEXTS = {"wikipedia": "wiki", "news": "news", "technical": "technical", "code": "code", "chat": "chat"}
"""Name of a text in the comparison -> its name in the keys of a row."""

Row = dict[str, Any]


def rows_of(document: dict[str, Any]) -> list[Row]:
    """The rows of a comparison of several texts.

    Args:
        document: the content of its results.json.
    """
    by_text = {text["name"]: {row["name"]: row for row in text["rows"]} for text in document["texts"]}
    found = []
    for row in document["mean"]["rows"]:
        if row["method"] == "fp32":
            continue
        bundle = row["method"] == "bundle"
        found.append(
            {
                "file": row["name"].removesuffix(" on average"),
                "kind": row["method"],
                "asked_bits": row["bits"] if bundle else None,
                "used_bits": round(row["bits_used"], 2) if bundle else None,
                "mb_per_token": round(row["linear_bytes"] / 1e6, 1),
                "perplexity_ratio": round(row["over_fp"]["value"], 3),
                "mean_kl_nats": round(row["divergence"]["value"], 4),
                "kl_stderr": round(row["divergence"]["stderr"], 4),
                "kl_p99": round(row["divergence_p99"], 3),
                "same_top": round(row["agreement"]["value"], 3),
                **{
                    f"kl_{key}": round(by_text[text][row["name"]]["divergence"]["value"], 4)
                    for text, key in TEXTS.items()
                    if text in by_text
                },
            }
        )
    return found


def merged(stored: dict[str, Any], rows: list[Row], facts: dict[str, str]) -> dict[str, Any]:
    """The stored results with new rows, the largest file first.

    Args:
        stored: the content of results/kl-divergence.json.
        rows: rows that replace those of the same files.
        facts: commit, machine and date of the new rows.
    """
    earlier = {key: stored[key] for key in ("commit", "machine") if stored[key]}
    names = {row["file"] for row in rows}
    kept = [{**row, **{key: row.get(key, value) for key, value in earlier.items()}} for row in stored["rows"]]
    of_all = [*rows, *(row for row in kept if row["file"] not in names)]
    return {**stored, **facts, "rows": sorted(of_all, key=lambda row: -row["mb_per_token"])}


def written(content: dict[str, Any]) -> str:
    """The file's text: one line for each fact and each row.

    Args:
        content: what the file holds.
    """
    facts = [f'  "{key}": {json.dumps(value, ensure_ascii=False)}' for key, value in content.items() if key != "rows"]
    rows = ",\n".join("    " + json.dumps(row, ensure_ascii=False) for row in content["rows"])
    return "{\n" + ",\n".join([*facts, f'  "rows": [\n{rows}\n  ]']) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--commit", required=True, help="commit of the code that was measured")
    parser.add_argument("--machine", required=True, help="what it ran on")
    parser.add_argument("--date", required=True, help="day of the measurement")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the rows; by default kl-divergence.json")
    args = parser.parse_args()
    rows = rows_of(json.loads(args.comparison.read_text(encoding="utf-8")))
    facts = {"date": args.date, "machine": args.machine, "commit": args.commit}
    stored = json.loads(args.results.read_text(encoding="utf-8"))
    args.results.write_text(written(merged(stored, rows, facts)), encoding="utf-8")


if __name__ == "__main__":
    main()
