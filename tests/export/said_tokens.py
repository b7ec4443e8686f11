"""What a bundle says token by token, beside a pass over the same tokens, and with a session."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mbq_runtime import Engine
from mbq_runtime.engine import Session
from mbq_runtime.engine.allowance import Allowance

TIE = 1e-3
"""Two tokens whose logits are this close, of the largest one, may take each other's place."""


def assert_steps_are_one_pass(engine: Engine, texts: Sequence[list[int]]) -> None:
    """Each token of a reply at 8 bits is the likeliest one of a pass over all of them."""
    for text in texts:
        reply = engine.generate(text, max_tokens=15, avg_bits=8)
        reply.text()
        said = reply.stats.tokens
        rows = Session(engine.path).run([*text, *said], 8.0).logits[len(text) - 1 : -1]
        assert (rows.max(1) - rows[np.arange(len(said)), said] <= TIE * np.abs(rows).max()).all()


def assert_sessions_say_the_same(engine: Engine, talk: list[int], kept_of_100: int) -> None:
    """A session goes on behind its reply, and back to the 100th token, of which it keeps ``kept_of_100``."""
    session = engine.session()
    first = engine.generate(talk, max_tokens=6, avg_bits=8, session=session)
    first.text()
    longer = [*talk, *first.stats.tokens, 7, 8, 9]
    for prompt, kept in ((longer, len(longer) - 4), ([*talk[:100], 1, 2, 3], kept_of_100)):
        reply = engine.generate(prompt, max_tokens=6, avg_bits=8, session=session)
        assert reply.text() == engine.generate(prompt, max_tokens=6, avg_bits=8).text()
        assert reply.stats.cached_tokens == kept


def logits_in_parts(engine: Engine, text: NDArray[np.int64], together: int) -> NDArray[np.float32]:
    """The logits of a text at 8 bits, float32 [tokens, vocab]: of passes of many tokens, then of a pass for each token.

    Args:
        engine: a loaded bundle.
        text: int64 [tokens].
        together: tokens of the first passes.
    """
    context, found = engine._backend.start(len(text), Allowance(engine.manifest, 8.0).numbers), []
    ends = [*range(engine._scoring_chunk, together, engine._scoring_chunk), *range(together, len(text))]
    for part in np.split(text.astype(np.int32), ends):
        context.append(part, len(part))
        found.append(context.logits().copy())
    return np.concatenate(found)
