"""The packaged model, rotated: the same function as a checkpoint of weights that no quantiser has shaped.

    python tests/benchmarks/rotated_checkpoint.py FOLDER [--model smollm2-135m] [--seed 0]
    mbq-export compare --model FOLDER --methods llama.cpp,autoround --data all

The weights of the packaged SmolLM2-135M come from blocks of 16 levels (Q4_1).  A format with such blocks finds the
levels again, so it loses nothing, which it would with weights that were trained in 16 bits.  A rotation of the residual
stream and of value heads keeps the function of the model and mixes each weight with hundreds of others.  The head is
not tied any more, because the last norm's gain is part of it.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch

from mbq_export.model.checkpoint import Checkpoint
from mbq_export.model.loading import load
from mbq_export.model.source import locate
from mbq_export.transforms.rotation import rotate

PROMPT = "The sea is deep, and the ships that cross it are"
LARGEST_CHANGE = 1e-3
"""Of a logit, beside the largest one: what float32 leaves of another order of sums."""


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model", default="smollm2-135m", show_default=True, help="As for an export.")
@click.option("--seed", default=0, show_default=True, help="Of the rotation.")
def main(folder: Path, model: str, seed: int) -> None:
    if folder.exists():
        raise click.UsageError(f"{folder} exists: name a new folder")
    original = load(locate(model))
    tokens = torch.tensor([original.tokens(PROMPT)])
    with torch.no_grad():
        expected = original.model(tokens, use_cache=False).logits
    if original.decoder.tied:
        head, table = original.decoder.head.sources[0], original.model.get_input_embeddings().weight
        original.linear(head).weight = torch.nn.Parameter(table.detach().clone(), requires_grad=False)
        original.model.config.tie_word_embeddings = False
    with TemporaryDirectory() as untied:
        _save(original, untied)
        checkpoint = load(locate(untied))
    rotate(checkpoint, seed)
    with torch.no_grad():
        found = checkpoint.model(tokens, use_cache=False).logits
    change = float((found - expected).abs().max() / expected.abs().max())
    if not change < LARGEST_CHANGE:
        raise click.ClickException(f"the logits changed by {change:.2g} of the largest, at most {LARGEST_CHANGE}")
    _save(checkpoint, str(folder))
    print(f"{folder}: logits changed by {change:.2g} of the largest")


def _save(checkpoint: Checkpoint, folder: str) -> None:
    checkpoint.model.save_pretrained(folder)
    checkpoint.tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
