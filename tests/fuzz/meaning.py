"""What a checkpoint means, and whether a bundle means the same.

transformers reads the checkpoint by itself, whatever was changed in it.  At 8 bits a bundle gives nearly its logits,
and exactly its tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

MOST_DIVERGENCE = 0.02
"""Nats a token at 8 bits.  The unchanged tiny models have a tenth of it at most."""
_TEXT = "The tide turns twice a day; naïve boats wait.\n  <eos> 12"
_TOKENS = 24


class Undecided(Exception):
    """transformers cannot say what the checkpoint means."""


def difference(model: Path, bundle: Path) -> str:
    """How a bundle differs from its checkpoint; "" where it says the same.

    Args:
        model: folder or GGUF file of the checkpoint.
        bundle: folder of a bundle that was made of it.

    Raises:
        Undecided: transformers cannot read the checkpoint, or gives numbers that are not finite.
    """
    from mbq_runtime import Engine
    from mbq_runtime.fidelity import compare_tokens

    where = {"gguf_file": model.name} if model.is_file() else {}
    folder = model.parent if model.is_file() else model
    engine = Engine.load(bundle, threads=1)
    vocab = engine.manifest.model.vocab_size
    tokens = [(7 + 11 * i) % vocab for i in range(min(_TOKENS, engine.context_length))]
    original = _logits(folder, where, tokens)
    found = engine.logits(tokens, engine.manifest.budget.max_bits).logits
    if found.shape != original.shape:
        return f"logits have shape {found.shape}, transformers gives {original.shape}"
    told = compare_tokens(found, original, tokens).divergence.mean()
    if not told <= MOST_DIVERGENCE:
        return f"the bundle diverges by {told:.3g} nats a token from what transformers makes of the checkpoint"
    expected, ids = _ids(folder, where), engine.encode(_TEXT)
    return "" if ids == expected else f"the bundle's tokens are {ids}, those of transformers {expected}"


def _logits(folder: Path, where: dict[str, str], tokens: list[int]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where).eval()
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0].numpy()
    except Exception as error:
        raise Undecided(f"transformers does not run it: {error}") from error
    if not (abs(logits) < 1e30).all():
        raise Undecided("transformers gives numbers that are not finite")
    return logits


def _ids(folder: Path, where: dict[str, str]) -> list[int]:
    from transformers import AutoTokenizer

    try:
        return list(AutoTokenizer.from_pretrained(folder, **where).encode(_TEXT, add_special_tokens=False))
    except Exception as error:
        raise Undecided(f"transformers does not read its tokenizer: {error}") from error
