from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mbq_runtime import UsageError, perplexity
from mbq_runtime.bundle.facts import Budget
from mbq_runtime.fidelity import TokenFidelity, compare_tokens
from mbq_runtime.perplexity import cut_windows, estimate, held, last_kept, measure, measure_against


def test_windows_do_not_overlap_and_drop_the_rest() -> None:
    assert cut_windows(list(range(10)), 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut_windows(list(range(10)), 4, limit=1) == [[0, 1, 2, 3]]
    assert cut_windows(list(range(10)), 4, limit=99) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_some_of_the_windows_are_spread_over_the_text() -> None:
    assert cut_windows(list(range(20)), 2, limit=4) == [[0, 1], [4, 5], [10, 11], [14, 15]]


def test_opening_token_takes_a_place_in_every_window() -> None:
    assert cut_windows(list(range(10, 20)), 4, [1]) == [[1, 10, 11, 12], [1, 13, 14, 15], [1, 16, 17, 18]]


@pytest.mark.parametrize(
    ("tokens", "context", "limit", "message"),
    [(3, 4, None, "the text has 3 tokens, one window needs 4"), (9, 1, None, "context 1"), (9, 4, 0, "windows 0")],
)
def test_windows_that_cannot_be_cut(tokens: int, context: int, limit: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cut_windows(list(range(tokens)), context, limit=limit)


def test_estimate_by_hand() -> None:
    # Means 1, 2, 3: mean 2, variance ((1 + 0 + 1) / 2) = 1, stderr of the mean 1 / sqrt(3).
    found = estimate([1.0, 2.0, 3.0])
    assert found.ppl == pytest.approx(math.e**2)
    assert found.ppl_stderr == pytest.approx(math.e**2 / math.sqrt(3))
    assert astuple(estimate([math.log(7), math.log(7)])) == pytest.approx((7.0, 0.0))
    alone = estimate([math.log(5)])
    assert alone.ppl == pytest.approx(5.0)
    assert alone.ppl_stderr is None
    assert estimate([1e4]).ppl == math.inf


def test_measure_averages_windows() -> None:
    scores = {(1, 2): (1.0, 3.5), (3, 4): (3.0, 4.5)}
    calls: list[tuple[int, int]] = []

    def score(window: Sequence[int]) -> tuple[float, float]:
        return scores[tuple(window)]  # type: ignore[index]

    row = measure([[1, 2], [3, 4]], 4.0, score, lambda done, total: calls.append((done, total)))
    assert astuple(row) == pytest.approx((4.0, 4.0, math.e**2, math.e**2))
    assert calls == [(1, 2), (2, 2)]


def test_held_bits_are_the_budget_on_average() -> None:
    asked = []

    def score(window: Sequence[int], bits: float) -> tuple[float, float]:
        asked.append(bits)
        return 1.0, bits - 0.2  # routers that use less on this text than they were asked for

    budget = Budget(3.0, 8.0, 8.0)
    row = measure([[0] * 512] * 8, 4.0, held(score, 4.0, budget))
    assert asked == pytest.approx([4.0, *[4.2] * 7])
    assert row.bits == 4.0
    assert row.avg_bits_used == pytest.approx(4.0 - 0.2 / 8)
    # A short window corrects less.  A budget outside the bundle's range is never asked for.
    asked.clear()
    measure([[0] * 20] * 2, 4.0, held(score, 4.0, budget))
    assert asked == pytest.approx([4.0, 4.02])
    asked.clear()
    measure([[0] * 512] * 2, 8.0, held(score, 8.0, budget))
    assert asked == [8.0, 8.0]


def test_texts_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        perplexity.read_text(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match="byte 3 is not UTF-8"):
        perplexity.read_text(tmp_path / "latin.txt")


def test_reference_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, perplexity.REFERENCE_MODULE, None)
    with pytest.raises(UsageError, match=r"pip install 'mbq-export\[export\]'"):
        perplexity.load_reference()


def test_reference_is_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType(perplexity.REFERENCE_MODULE)
    module.load_logits = lambda model: lambda tokens: np.full((len(tokens), 3), 0.5)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, perplexity.REFERENCE_MODULE, module)
    assert (perplexity.load_reference()("m")([1, 2]) == 0.5).all()


def test_logits_of_the_last_window_are_kept() -> None:
    asked: list[list[int]] = []

    def logits(tokens: Sequence[int]) -> np.ndarray:
        asked.append(list(tokens))
        return np.full((len(tokens), 2), len(asked), np.float32)

    kept = last_kept(logits)
    assert [kept(window)[0, 0] for window in ([1], [1], [2], [1])] == [1, 1, 2, 3]
    assert asked == [[1], [2], [1]]


def test_measure_against_by_hand() -> None:
    p, q = np.log(np.array([[0.5, 0.25, 0.25], [0.2, 0.6, 0.2]], np.float32))
    windows, calls = [[0, 1, 2], [2, 0, 1]], []

    def original(window: Sequence[int]) -> np.ndarray:
        return np.tile(p, (len(window), 1))

    def score(found: np.ndarray, used: float) -> perplexity.ScorerAgainst:
        def scored(window: Sequence[int]) -> tuple[TokenFidelity, float]:
            calls.append((used, tuple(window)))
            rows = np.tile(found, (len(window) - 1, 1))
            return compare_tokens(rows, original(window)[:-1], window[1:]), used

        return scored

    scorers = [(8.0, score(p, 8.0)), (4.0, score(q, 4.1))]
    reference, (same, other) = measure_against(windows, scorers, original)
    assert calls == [(used, tuple(window)) for window in windows for used in (8.0, 4.1)], "the window is the outer loop"
    own = [math.log(4), math.log(8) / 2]
    assert astuple(reference) == pytest.approx(astuple(estimate(own)))
    assert astuple(same) == pytest.approx((8.0, 8.0, *astuple(reference), 1, 0, 0, 0, 0, 0, 1, 0))
    assert same.kl_p999 == 0.0
    nll = [-(math.log(0.6) + math.log(0.2)) / 2] * 2
    kl = 0.5 * math.log(0.5 / 0.2) + 0.25 * math.log(0.25 / 0.6) + 0.25 * math.log(0.25 / 0.2)
    ratio = estimate([a - b for a, b in zip(nll, own, strict=True)])
    expected = (4.0, 4.1, *astuple(estimate(nll)), *astuple(ratio), kl, 0, kl, kl, 0, 0)
    assert astuple(other) == pytest.approx(expected, abs=1e-6)
    _, (alone,) = measure_against(windows[:1], scorers[:1], original)
    assert (alone.kl_stderr, alone.ppl_ratio_stderr, alone.same_top_stderr) == (None, None, None)
