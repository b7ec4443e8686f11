"""Make a file of results from what ``tests/benchmarks/versus.py --json`` writes, a file for each model.

    python docs/speed_rows.py SMOLLM2.json LLAMA_1B.json --machine MACHINE --date DAY [--results speed-avx512]

Runs for speed-avx2, the default, are of ``--target x86-64-v3 --threads 1``.  Those for speed-avx512 have two threads
and a llama.cpp that is compiled for the machine.  Figures are medians.  ``docs/tables.py`` makes the tables afterwards.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from kl_rows import written

RESULTS = Path(__file__).resolve().parents[1] / "results"
RUNS = {
    "speed-avx2": (
        "Decode and prompt speed with AVX2 instructions beside llama.cpp, tokens/s",
        "--target x86-64-v3 --threads 1 --clock cpu",
    ),
    "speed-avx512": (
        "Decode and prompt speed with AVX-512 instructions beside llama.cpp, tokens/s",
        '--threads 2 --only "^mbq$|^mbq tvm$|llama.cpp Q(8_0|4_0|2_K)"',
    ),
}
"""Name of a file of results -> its title, and options of the benchmark."""
MODELS = {"smollm2-135m": "smollm2", "llama-1b": "llama_1b"}
"""Name of a model in the benchmark -> its name in the keys of a row."""
TOKENS = {"tg": ("decode", 1), "pp128": ("prompt_128", 128), "pp512": ("prompt_512", 512)}
"""Name of a test -> its name in the keys of a row, and tokens in a pass."""

Row = dict[str, Any]


def rows_of(documents: list[dict[str, Any]]) -> list[Row]:
    """One row a side, with the tokens/s of each model and test; None where nothing was measured.

    Args:
        documents: what the benchmark wrote, one for each model.
    """
    keys = [f"{model}_{test}" for model in MODELS.values() for test, _ in TOKENS.values()]
    rows: dict[str, Row] = {}
    for document in documents:
        for side in document["sides"]:
            name = side["name"].replace("mbq ", "mbq, ", 1).replace("tvm ", "tvm, ").replace("a8 ", "a8, ")
            row = rows.setdefault(name, {"side": name, **dict.fromkeys(keys)})
            for test, seconds in side["seconds"].items():
                label, tokens = TOKENS[test]
                row[f"{MODELS[document['model']]}_{label}"] = round(tokens / statistics.median(seconds), 1)
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--machine", required=True, help="what it ran on")
    parser.add_argument("--date", required=True, help="day of the measurement")
    parser.add_argument("--results", choices=RUNS, default="speed-avx2", help="file to write, without its suffix")
    args = parser.parse_args()
    documents = [json.loads(run.read_text(encoding="utf-8")) for run in args.runs]
    title, options = RUNS[args.results]
    commits = sorted({document["environment"]["commit"] for document in documents})
    facts = {
        "title": title,
        "date": args.date,
        "machine": args.machine,
        "commit": ", ".join(commits),
        "published_in": None,
        "command": f"python tests/benchmarks/versus.py --model llama-1b {options}",
        "notes": [
            "Medians of one run in which all sides take turns. Slices 2,2,2,2. a8: activations of 8 bits.",
            "llama-1b: a random Llama of 1.04 G weights. SmolLM2-135M: the same command without --model.",
        ],
    }
    (RESULTS / f"{args.results}.json").write_text(written({**facts, "rows": rows_of(documents)}), encoding="utf-8")


if __name__ == "__main__":
    main()
