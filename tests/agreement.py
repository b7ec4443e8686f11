"""How closely the logits of two engines or two machines agree that run one model.

A bundle has keys and values of 8 bits by default. A number at the border between two codes gets either by the last
bits of its arithmetic, and these differ between engines and between processors. So logits agree as closely as 8 bits
agree with float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.fidelity import compare_tokens

LARGEST_DIFFERENCE = 0.05
"""Of the largest logit.  0.02 is seen."""

MOST_KL = 2e-3
"""Mean divergence in nats a token.  8e-4 is seen."""

Logits = NDArray[Any]


def assert_agree(found: Logits, expected: Logits, what: str = "") -> None:
    """Compare logits, float [tokens, vocab], of the same tokens.

    Args:
        found: of one engine or machine.
        expected: of the other.
        what: is compared.
    """
    assert found.shape == expected.shape, what
    off, nats = difference(found, expected), divergence(expected, found)
    print(f"\n{what}: logits differ by {off:.1e} of the largest, {nats:.1e} nats")
    assert off <= LARGEST_DIFFERENCE, what
    assert nats <= MOST_KL, what


def difference(found: Logits, expected: Logits) -> float:
    """The largest difference, of the largest expected logit.

    Args:
        found: float [tokens, vocab].
        expected: float [tokens, vocab].
    """
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def divergence(expected: Logits, found: Logits) -> float:
    """Mean KL divergence of the next tokens, in nats.

    Args:
        expected: float [tokens, vocab].
        found: float [tokens, vocab].
    """
    return float(compare_tokens(found, expected, expected.argmax(axis=1)).divergence.mean())
