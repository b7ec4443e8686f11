"""KL divergence, percentiles and first choices against numbers worked out by hand and by plain numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mbq_runtime.fidelity import Mean, compare_tokens, divergence, mean


def logits_of(*rows: list[float]) -> np.ndarray:
    """float32 logits of distributions.  Each row gets a constant of its own, which no result may depend on."""
    constants = np.arange(len(rows))[:, None] - 1.5
    return (np.log(np.array(rows)) + constants).astype(np.float32)


def test_divergence_of_known_distributions() -> None:
    p, q = [0.5, 0.25, 0.25], [0.2, 0.6, 0.2]
    found = compare_tokens(logits_of(q, p, p), logits_of(p, p, q), [1, 0, 2])
    forth = 0.5 * math.log(0.5 / 0.2) + 0.25 * math.log(0.25 / 0.6) + 0.25 * math.log(0.25 / 0.2)
    back = 0.2 * math.log(0.2 / 0.5) + 0.6 * math.log(0.6 / 0.25) + 0.2 * math.log(0.2 / 0.25)
    assert found.divergence == pytest.approx([forth, 0, back], abs=1e-6)
    assert found.nll == pytest.approx([-math.log(0.6), -math.log(0.5), -math.log(0.25)], abs=1e-6)
    assert found.same_top.tolist() == [False, True, False]


def test_divergence_against_float64() -> None:
    generator = np.random.default_rng(0)
    original = (4 * generator.standard_normal((100, 5000))).astype(np.float32)
    logits = original + (0.05 * generator.standard_normal(original.shape)).astype(np.float32)
    targets = generator.integers(0, 5000, 100)

    def log_softmax(rows: np.ndarray) -> np.ndarray:
        wide = rows.astype(np.float64)
        return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))

    log_p, log_q = log_softmax(original), log_softmax(logits)
    found = compare_tokens(logits, original, targets)
    assert found.divergence == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(axis=1), rel=1e-3, abs=1e-7)
    assert found.nll == pytest.approx(-log_q[np.arange(100), targets], abs=1e-5)
    assert (found.same_top == (log_p.argmax(axis=1) == log_q.argmax(axis=1))).all()
    same = compare_tokens(original, original, targets)
    assert not same.divergence.any()
    assert same.same_top.all()


def test_of_equal_tokens_the_lowest_id_is_the_first_choice() -> None:
    original = np.array([[2, 2, 1], [2, 2, 1], [1, 2, 2]], np.float32)
    logits = np.array([[3, 1, 1], [1, 3, 1], [1, 5, 5]], np.float32)
    assert compare_tokens(logits, original, [0, 0, 0]).same_top.tolist() == [True, False, True]


def test_percentiles_are_over_the_tokens_of_all_windows() -> None:
    tokens = np.random.default_rng(0).permutation(2001) / 2000
    found = divergence([tokens[:500], tokens[500:1000], tokens[1000:]])
    assert found.p99 == pytest.approx(0.99)
    assert found.p999 == pytest.approx(0.999)
    means = [tokens[:500].mean(), tokens[500:1000].mean(), tokens[1000:].mean()]
    assert found.mean.value == pytest.approx(np.mean(means))
    assert found.mean.stderr == pytest.approx(np.std(means, ddof=1) / math.sqrt(3))
    assert mean([2.0]) == Mean(2.0, None)
