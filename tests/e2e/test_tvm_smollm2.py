"""The real model on this machine by both engines: the same tokens, the same numbers."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from mbq_runtime import Engine

pytestmark = pytest.mark.slow

PROMPT = "The history of the lighthouse begins"
REPLY_TOKENS = 64
LOGITS_TOLERANCE = 1e-2  # of the largest logit
TIE = 1e-3


def test_the_compiled_decoder_says_what_the_graph_says(smollm2_bundles: dict[str, Path]) -> None:
    engines = [Engine.load(smollm2_bundles["host"], engine=name) for name in ("onnx", "tvm")]
    onnx, compiled = engines
    replies = [e.generate(PROMPT, max_tokens=REPLY_TOKENS, avg_bits=8, chat=False) for e in engines]
    texts = [reply.text() for reply in replies]
    theirs, ours = (reply.stats.tokens for reply in replies)
    prompt = onnx.encode(PROMPT, add_bos=True)
    if ours != theirs:
        # Only where the graph itself could hardly tell two tokens apart.
        agreed = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        best = np.sort(onnx.logits([*prompt, *theirs[:agreed]], 8.0).logits[-1])[-2:]
        assert best[1] - best[0] <= TIE, (agreed, texts)
    low = onnx.manifest.budget.min_bits
    for bits in (low, 4.0, 8.0):
        a, b = (engine.logits([*prompt, *theirs], bits) for engine in (compiled, onnx))
        error = np.abs(a.logits - b.logits).max() / np.abs(b.logits).max()
        print(f"\n{bits:g} bits: logits differ by {error:.1e} of the largest, {a.avg_bits_used:.3f} bits used")
        assert error <= LOGITS_TOLERANCE
        assert a.avg_bits_used == pytest.approx(b.avg_bits_used, abs=0.02)


@pytest.mark.parametrize("bits", [3.5, 8.0])
def test_a_token_has_the_same_logits_in_a_pass_of_few(smollm2_bundles: dict[str, Path], bits: float) -> None:
    """To the last bit and for any number of threads, so that guessed tokens never change a reply.

    The context is longer than a chunk of attention.
    """
    engines = [Engine.load(smollm2_bundles["host"], engine="tvm", threads=n, context=640) for n in (1, 2)]
    found = []
    for engine, size in product(engines, (1, 2, 5, 8)):
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
