"""At which budgets do people see that a reply is not the original's?

    python tests/benchmarks/blind_study.py write BUNDLE FOLDER [--bits 8,5,4,3.5,3] [--tokens 96]
    python tests/benchmarks/blind_study.py score FOLDER ANSWERS.json ... [--json FILE]

``write`` lets the original and the bundle answer the held-back prompts greedily.  It writes ``sheet.md`` for readers
and ``key.json``, which they do not see.  A pair on the sheet has a question and two replies, A and B, in random order.
Which one is the original's, and at how many bits the other one was made, is in the key alone.  Equal replies are not
shown.  A reader writes a JSON object that has "A", "B" or "same" for each number: the better reply, judged by whether
it answers the question, says true things, and does not repeat itself or fall apart.  ``score`` counts.

8 bits are the control: the replies differ, but none should be better.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import click
import torch
from measured_on import measured_on

from mbq_export.data.replies import HELD_BACK
from mbq_export.model.loading import load
from mbq_export.model.source import locate
from mbq_runtime import Engine
from mbq_runtime.tables import markdown

ANSWERS = ("A", "B", "same")


def original_replies(model: str, prompts: list[list[int]], tokens: int) -> list[str]:
    """Greedy replies of the float32 model."""
    checkpoint = load(locate(model))
    replies = []
    for prompt in prompts:
        with torch.no_grad():
            found = checkpoint.model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=tokens, do_sample=False, pad_token_id=0,
            )  # fmt: skip
        replies.append(checkpoint.tokenizer.decode(found[0, len(prompt) :], skip_special_tokens=True).strip())
    return replies


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--bits", default="8,5,4,3.5,3", show_default=True)
@click.option("--tokens", default=96, show_default=True)
@click.option("--threads", default=1, show_default=True)
def write(bundle: Path, folder: Path, model: str, bits: str, tokens: int, threads: int) -> None:
    """Write the sheet and the key."""
    folder.mkdir(parents=True)
    questions: list[str] = json.loads(HELD_BACK.read_text(encoding="utf-8"))["chat"]
    engine = Engine.load(bundle, threads=threads)
    prompts = [list(engine.prompt_tokens(question)) for question in questions]
    originals = original_replies(model, prompts, tokens)
    pairs: list[dict[str, Any]] = []
    for budget in map(float, bits.split(",")):
        for question, prompt, original in zip(questions, prompts, originals, strict=True):
            said = engine.generate(prompt, max_tokens=tokens, avg_bits=budget).text().strip()
            pairs.append({"bits": budget, "question": question, "original": original, "bundle": said})
    generator = random.Random(0)
    shown = [pair for pair in pairs if pair["original"] != pair["bundle"]]
    generator.shuffle(shown)
    sheet = []
    for number, pair in enumerate(shown, 1):
        pair["number"], pair["original_is"] = number, generator.choice("AB")
        first, second = ("original", "bundle") if pair["original_is"] == "A" else ("bundle", "original")
        sheet.append(f"## {number}\n\n{pair['question']}\n\n### A\n\n{pair[first]}\n\n### B\n\n{pair[second]}\n")
    (folder / "sheet.md").write_text("\n".join(sheet), encoding="utf-8")
    (folder / "key.json").write_text(json.dumps(pairs, indent=1) + "\n", encoding="utf-8")
    print(f"{len(shown)} pairs to judge, {len(pairs) - len(shown)} with equal replies")


@main.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.argument("answers", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the rows to this file.")
def score(folder: Path, answers: tuple[Path, ...], output: Path | None) -> None:
    """Count what readers found."""
    key: list[dict[str, Any]] = json.loads((folder / "key.json").read_text(encoding="utf-8"))
    readers = [{int(n): a for n, a in json.loads(file.read_text(encoding="utf-8")).items()} for file in answers]
    shown = {pair["number"] for pair in key if "number" in pair}
    for file, reader in zip(answers, readers, strict=True):
        if set(reader) != shown or not set(reader.values()) <= set(ANSWERS):
            raise click.ClickException(
                f"{file}: needs one of {', '.join(ANSWERS)} for each number from 1 to {len(shown)}"
            )
    rows = [
        _row(budget, [p for p in key if p["bits"] == budget], readers) for budget in sorted({p["bits"] for p in key})
    ]
    print(markdown(list(rows[0]), ([str(value) for value in row.values()] for row in rows)))
    if output is not None:
        document = {"environment": measured_on(), "readers": len(readers), "rows": rows}
        output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _row(budget: float, pairs: list[dict[str, Any]], readers: list[dict[int, str]]) -> dict[str, Any]:
    """Shares of all judgements at a budget.  z: the sign test of original against bundle, one judgement a pair by the
    sum of its readers."""
    found = {"original": 0, "bundle": 0, "same": 0}
    wins = losses = 0
    for pair in pairs:
        sum_of_readers = 0
        for reader in readers:
            answer = reader[pair["number"]] if "number" in pair else "same"
            better = "same" if answer == "same" else "original" if answer == pair["original_is"] else "bundle"
            found[better] += 1
            sum_of_readers += (better == "original") - (better == "bundle")
        wins, losses = wins + (sum_of_readers > 0), losses + (sum_of_readers < 0)
    total = sum(found.values())
    return {
        "bits": budget,
        "pairs": len(pairs),
        "equal_replies": sum("number" not in pair for pair in pairs),
        "original_better": round(found["original"] / total, 3),
        "bundle_better": round(found["bundle"] / total, 3),
        "original_wins": wins,
        "bundle_wins": losses,
        "z": round((wins - losses) / math.sqrt(wins + losses), 2) if wins + losses else 0.0,
    }


if __name__ == "__main__":
    main()
