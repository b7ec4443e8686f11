"""How close the bundles of stand-ins (``stand_in.py``) are to their originals, beside the first one.

    python tests/benchmarks/stand_in_curves.py OUT_OF_LLAMA OUT ... [--method nested] [--json FILE]

Each OUT is a folder that ``mbq-export compare --output OUT`` has written about one stand-in and its bundle, all on the
same texts.  A ratio is the mean divergence of a bundle over that of the first one at the same budget: 1 or less is at
least as good.  +- is the standard error over windows.  All stand-ins have one tokenizer, so windows are paired.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from measured_on import measured_on

from mbq_runtime.fidelity import Mean
from mbq_runtime.tables import markdown

Found = dict[str, Any]


def ratio(found: list[list[float]], first: list[list[float]]) -> Mean:
    """The mean of ``found`` over that of ``first``.  Each: the divergence of every window, by text.

    Each text has the same weight.  The error is that of the residuals of paired windows, text by text.
    """
    below = float(np.mean(np.concatenate(first)))
    value = float(np.mean(np.concatenate(found))) / below
    residuals = [np.subtract(a, value * np.array(b)) / below for a, b in zip(found, first, strict=True)]
    errors = [of_text.std(ddof=1) / np.sqrt(len(of_text)) for of_text in residuals]
    return Mean(value, float(np.linalg.norm(errors)) / len(errors))


def by_budget(compared: Found) -> dict[float, tuple[Found, list[list[float]]]]:
    """By asked bits: the mean row of the bundle over all texts, and the divergence of every window, by text."""
    found = {}
    for at, row in enumerate(compared["mean"]["rows"]):
        if row["method"] == "bundle":
            found[row["bits"]] = row, [text["rows"][at]["scores"]["divergence"] for text in compared["texts"]]
    return found


def rows(compared: list[Found], method: str) -> list[Found]:
    """One row a stand-in and budget.  compared: contents of results.json; method: how the bundles were made."""
    first, found = by_budget(compared[0]), []
    for one in compared:
        config = json.loads((Path(one["model"]) / "config.json").read_text(encoding="utf-8"))
        (original,) = (row for row in one["mean"]["rows"] if row["method"] == "fp32")
        for bits, (row, windows) in by_budget(one).items():
            over = ratio(windows, first[bits][1])
            found.append(
                {
                    "family": config["model_type"],
                    "method": method,
                    "asked_bits": bits,
                    "used_bits": round(row["bits_used"], 2),
                    "float32_perplexity": round(original["ppl"]["value"], 2),
                    "perplexity_ratio": round(row["over_fp"]["value"], 4),
                    "mean_kl_nats": float(f"{row['divergence']['value']:.4g}"),
                    "kl_stderr": float(f"{row['divergence']['stderr']:.2g}"),
                    "same_top": round(row["agreement"]["value"], 4),
                    "kl_over_first": round(over.value, 3),
                    "over_first_stderr": round(over.stderr or 0.0, 3),
                }
            )
    return found


@click.command(help=__doc__)
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--method", default="nested", help="How the bundles were made; it goes into the rows.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the rows to this file.")
def main(folders: tuple[Path, ...], method: str, output: Path | None) -> None:
    compared = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in folders]
    found = rows(compared, method)
    print(json.dumps(measured_on()))
    print(
        markdown(list(found[0]), ([str(value) for value in row.values()] for row in found), words=["family", "method"])
    )
    if output is not None:
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
