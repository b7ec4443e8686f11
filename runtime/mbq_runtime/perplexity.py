"""Perplexity over the windows of a text: how well a model predicts it at a budget.

The tokens of the text are cut into windows of ``context`` tokens that do not overlap.  The rest at the end is dropped,
so that every window has the same weight.  If fewer windows are wanted, they are spread evenly over the text: neighbours
are alike, and tell less than their number.  If the tokenizer puts an opening token before every text, each window
begins with it.  In each window, tokens 1 to context - 1 are predicted from the tokens before them.  With m_w the mean
negative log-likelihood of window w in nats, over W windows::

    mean   = sum(m_w) / W
    ppl    = exp(mean)
    stderr = ppl * sqrt(sum((m_w - mean)**2) / (W - 1) / W)

The standard error is over windows and not over tokens: the tokens of a window are not independent.  It needs two
windows.  The delta method takes the error of the mean through the exponential.

With the original model beside it, the module measures KL divergence and the share of the same first choice too (see
``fidelity``).  A ratio of two perplexities is exp(mean(d)) of the paired differences d_w of their windows, so most of
the difference between windows leaves its error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .bundle.facts import Budget
from .control.budget_trim import BudgetTrim
from .engine.score import mean_nll
from .errors import UsageError
from .fidelity import TokenFidelity, divergence, mean
from .progress import Progress
from .text_file import read_text_file

_MOST_TEXT_BYTES = 16 << 20
"""All of a text is made tokens, which takes more than 100 times its bytes of memory."""

REFERENCE_MODULE = "mbq_export.reference_ppl"
"""The module of the workstation side that has a ReferenceLoader ``load_logits``."""

Windows = Sequence[Sequence[int]]
Scorer = Callable[[Sequence[int]], tuple[float, float]]
"""(tokens of a window) -> (mean negative log-likelihood in nats, average bits used)."""
Logits = Callable[[Sequence[int]], NDArray[np.float32]]
"""(tokens of a window) -> float32 [S, V] logits of every token."""
ReferenceLoader = Callable[[str], Logits]
"""(model, as ``mbq-export --model`` takes it) -> its logits."""
ScorerAgainst = Callable[[Sequence[int]], tuple[TokenFidelity, float]]
"""(tokens of a window) -> the comparison with the original, average bits used."""
_Scored = TypeVar("_Scored")


@dataclass(frozen=True)
class Estimate:
    """A perplexity.

    ppl: its value.
    ppl_stderr: standard error; None for a single window.
    """

    ppl: float
    ppl_stderr: float | None


@dataclass(frozen=True)
class PerplexityResult:
    """The perplexity at one budget.

    bits: budget in average bits per weight.
    avg_bits_used: average bits per weight that the routers chose, mean over windows.
    ppl: perplexity.
    ppl_stderr: its standard error; None for a single window.
    """

    bits: float
    avg_bits_used: float
    ppl: float
    ppl_stderr: float | None


@dataclass(frozen=True)
class ReferencedResult(PerplexityResult):
    """The perplexity at one budget, and how far the model is from the original.

    ppl_ratio: perplexity over the original's.
    ppl_ratio_stderr: its standard error, from paired windows; None for a single window.
    kl: mean KL divergence from the original in nats a token.
    kl_stderr: its standard error; None for a single window.
    kl_p99: KL divergence that 99 % of the tokens stay below, in nats.
    kl_p999: KL divergence that 99.9 % of the tokens stay below, in nats.
    same_top: share of tokens with the same first choice, 0 to 1.
    same_top_stderr: its standard error; None for a single window.
    """

    ppl_ratio: float
    ppl_ratio_stderr: float | None
    kl: float
    kl_stderr: float | None
    kl_p99: float
    kl_p999: float
    same_top: float
    same_top_stderr: float | None


def read_text(path: Path) -> str:
    """Read a text.

    Args:
        path: UTF-8 file of at most 16 MiB.

    Raises:
        UsageError: the file cannot be read, is too large, or is not UTF-8.
    """
    return read_text_file(path, _MOST_TEXT_BYTES)


def cut_windows(
    tokens: Sequence[int], context: int, opening: Sequence[int] = (), limit: int | None = None
) -> list[list[int]]:
    """Cut a text into windows.

    Args:
        tokens: ids of the text.
        context: tokens of a window, at least 2.
        opening: ids that each window begins with.
        limit: most windows, which are spread evenly over the text; None for all.

    Raises:
        UsageError: the tokens do not fill a window.

    >>> cut_windows(range(9), context=4, opening=[0])
    [[0, 0, 1, 2], [0, 3, 4, 5], [0, 6, 7, 8]]
    """
    span = context - len(opening)
    if span < 1 or context < 2:
        raise UsageError(f"context {context}: needed at least {max(2, len(opening) + 1)} tokens")
    if limit is not None and limit < 1:
        raise UsageError(f"windows {limit}: needed at least 1")
    count = len(tokens) // span
    if count == 0:
        raise UsageError(
            f"the text has {len(tokens)} tokens, one window needs {span}; give a longer text or a smaller context"
        )
    taken = min(count, limit or count)
    starts = [i * count // taken * span for i in range(taken)]
    return [[*opening, *tokens[start : start + span]] for start in starts]


def estimate(window_nll: Sequence[float]) -> Estimate:
    """Perplexity and its standard error, by the formulas above.

    Args:
        window_nll: mean negative log-likelihood of each window in nats, at least one.

    >>> estimate([0.0, 0.0])
    Estimate(ppl=1.0, ppl_stderr=0.0)
    """
    found = mean(window_nll)
    ppl = _exp(found.value)
    return Estimate(ppl, None if found.stderr is None else ppl * found.stderr)


def measure(windows: Windows, bits: float, score: Scorer, progress: Progress | None = None) -> PerplexityResult:
    """Score all windows at one budget.

    Args:
        windows: ids of each window.
        bits: budget in average bits per weight, for the result.
        score: scores a window.
        progress: called with (windows done, windows in all).
    """
    nll, used = [], []
    for done, window in enumerate(windows, 1):
        window_nll, window_bits = score(window)
        nll.append(window_nll)
        used.append(window_bits)
        if progress is not None:
            progress(done, len(windows))
    found = estimate(nll)
    return PerplexityResult(bits, math.fsum(used) / len(used), found.ppl, found.ppl_stderr)


def measure_against(
    windows: Windows,
    scorers: Sequence[tuple[float, ScorerAgainst]],
    original: Logits,
    progress: Progress | None = None,
) -> tuple[Estimate, list[ReferencedResult]]:
    """Score all windows at several budgets beside the original model.

    A window is scored at every budget before the next one, so that the original's logits of one window are in memory.

    Args:
        windows: ids of each window.
        scorers: (budget in average bits per weight, what scores a window at it) of each budget.
        original: the original's logits, see ``last_kept``.
        progress: called with (windows done, windows in all).

    Returns:
        The original's perplexity, and the result of each budget.
    """
    own: list[float] = []
    found: list[list[tuple[TokenFidelity, float]]] = [[] for _ in scorers]
    for done, window in enumerate(windows, 1):
        for scored, (_, score) in zip(found, scorers, strict=True):
            scored.append(score(window))  # refuses another vocabulary
        own.append(mean_nll(original(window)[:-1], np.asarray(window[1:], np.int64)))
        if progress is not None:
            progress(done, len(windows))
    rows = [_referenced(bits, scored, own) for (bits, _), scored in zip(scorers, found, strict=True)]
    return estimate(own), rows


def _referenced(bits: float, scored: Sequence[tuple[TokenFidelity, float]], own: Sequence[float]) -> ReferencedResult:
    """scored: of each window; own: the original's mean negative log-likelihood of each window."""
    nll = [float(tokens.nll.mean()) for tokens, _ in scored]
    ppl, ratio = estimate(nll), estimate([a - b for a, b in zip(nll, own, strict=True)])
    kl = divergence([tokens.divergence for tokens, _ in scored])
    same_top = mean([float(tokens.same_top.mean()) for tokens, _ in scored])
    return ReferencedResult(
        bits,
        mean([used for _, used in scored]).value,
        ppl.ppl,
        ppl.ppl_stderr,
        ratio.ppl,
        ratio.ppl_stderr,
        kl.mean.value,
        kl.mean.stderr,
        kl.p99,
        kl.p999,
        same_top.value,
        same_top.stderr,
    )


def last_kept(logits: Logits) -> Logits:
    """The same logits.  Those of the last window are kept, so that the model runs once for all budgets.

    Args:
        logits: runs the model.
    """
    kept: tuple[tuple[int, ...], NDArray[np.float32]] | None = None

    def remembered(window: Sequence[int]) -> NDArray[np.float32]:
        nonlocal kept
        if kept is None or kept[0] != tuple(window):
            kept = None  # frees the old logits before the new ones are made
            kept = (tuple(window), logits(window))
        return kept[1]

    return remembered


def held(
    score: Callable[[Sequence[int], float], tuple[_Scored, float]], bits: float, budget: Budget
) -> Callable[[Sequence[int]], tuple[_Scored, float]]:
    """A scorer that holds the average of bits over the windows, as a governor does over tokens.

    Args:
        score: (tokens of a window, bits to ask for) -> what is measured, average bits used.
        bits: average bits per weight to hold.
        budget: range of what may be asked for.
    """
    trim = BudgetTrim(bits)

    def scored(window: Sequence[int]) -> tuple[_Scored, float]:
        nonlocal trim
        found, used = score(window, trim.request(budget.min_bits, budget.max_bits))
        trim = trim.after(used, len(window))
        return found, used

    return scored


def load_reference() -> ReferenceLoader:
    """The function that loads an original model.

    Raises:
        UsageError: the workstation side, which has it, is not installed.
    """
    try:
        loader: ReferenceLoader = import_module(REFERENCE_MODULE).load_logits
    except ImportError as error:
        raise UsageError(
            f"a reference model needs the workstation side, which is not installed ({error}): "
            "pip install 'mbq-export[export]'"
        ) from None
    return loader


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf
