"""What a bundle says token by token, beside a pass over the same tokens, and with a session."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mbq_runtime import Engine
from mbq_runtime.engine import Session

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
