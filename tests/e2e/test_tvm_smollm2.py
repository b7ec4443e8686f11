"""The real model on this machine by both engines: the same tokens, the same numbers."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from agreement import assert_agree

from mbq_runtime import Engine

pytestmark = pytest.mark.slow

PROMPT = "The history of the lighthouse begins"
REPLY_TOKENS = 64


def test_the_compiled_decoder_says_what_the_graph_says(smollm2_bundles: dict[str, Path]) -> None:
    engines = [Engine.load(smollm2_bundles["host"], engine=name) for name in ("onnx", "tvm")]
    onnx, compiled = engines
    prompt = onnx.encode(PROMPT, add_bos=True)
    for engine in engines:
        # Token by token, and all in one pass.
        reply = engine.generate(PROMPT, max_tokens=REPLY_TOKENS, avg_bits=8, chat=False)
        reply.text()
        said = list(reply.stats.tokens)
        assert len(said) >= REPLY_TOKENS // 2  # the model may end its reply
        whole = engine.logits([*prompt, *said], 8.0).logits
        assert whole[len(prompt) - 1 : -1].argmax(1).tolist() == said
    low = onnx.manifest.budget.min_bits
    for bits in (low, 4.0, 8.0):
        a, b = (engine.logits([*prompt, *said], bits) for engine in (compiled, onnx))
        assert_agree(a.logits, b.logits, f"{bits:g} bits")
        assert a.avg_bits_used == pytest.approx(b.avg_bits_used, abs=0.02)


@pytest.mark.parametrize("name", ["onnx", "tvm"])
@pytest.mark.parametrize("bits", [3.5, 8.0])
def test_a_token_has_the_same_logits_in_any_pass(smollm2_bundles: dict[str, Path], bits: float, name: str) -> None:
    """To the last bit and for any number of threads.

    So neither guessed tokens nor a context that is kept ever change a reply. The context is longer than a chunk of
    attention.
    """
    engines = [Engine.load(smollm2_bundles["host"], engine=name, threads=n, context=640) for n in (1, 2)]
    found = []
    for engine, size in product(engines, (1, 2, 5, 8, 40)):
        budget = engine._allowed(bits).numbers
        tokens = np.asarray((engine.encode(PROMPT) * 100)[:600], np.int32)
        context, rows = engine._backend.start(len(tokens), budget), []
        context.append(tokens[:560], 1)
        for start in range(560, len(tokens), size):
            part = tokens[start : start + size]
            context.append(part, len(part))
            rows.append(context.logits().copy())
        found.append(np.concatenate(rows))
    for logits in found[1:]:
        np.testing.assert_array_equal(logits, found[0])
