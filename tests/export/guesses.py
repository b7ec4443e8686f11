"""Replies with guessed tokens beside the same replies without them."""

from __future__ import annotations

from typing import Any

import numpy as np

from mbq_runtime import Engine


def assert_guesses_change_nothing(engine: Engine, *, replies: int, tokens: int, avg_bits: float = 8.0) -> None:
    """Compare replies of ``tokens`` tokens to random prompts, half of them drawn with a seed."""
    rng, guessed, kept = np.random.default_rng(0), 0, 0
    for seed in range(replies):
        prompt = rng.integers(0, engine.manifest.model.vocab_size, rng.integers(2, 24)).tolist()
        options: dict[str, Any] = {"max_tokens": tokens, "temperature": seed % 2, "seed": seed, "avg_bits": avg_bits}
        found = []
        for mode in ("off", "on"):
            engine.speculate = mode
            reply = engine.generate(prompt, **options)
            reply.text()
            found.append(reply.stats)
        assert found[0].tokens == found[1].tokens, seed
        guessed, kept = guessed + found[1].guessed, kept + found[1].kept_guesses
    engine.speculate = "off"
    assert guessed > kept > 0, (guessed, kept)  # some were right, some were not
