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
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from .bundle.manifest import Budget
from .control.budget_trim import BudgetTrim
from .errors import UsageError
from .progress import Progress

REFERENCE_MODULE = "mbq_export.reference_ppl"
"""The module of the workstation side that has a ReferenceScorer ``window_nll``."""

Windows = Sequence[Sequence[int]]
Scorer = Callable[[Sequence[int]], tuple[float, float]]
"""(tokens of a window) -> (mean negative log-likelihood in nats, average bits used)."""
ReferenceScorer = Callable[[str, list[list[int]], Progress], list[float]]
"""(model, windows, progress by windows) -> mean negative log-likelihood of each window in nats."""


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


def read_text(path: Path) -> str:
    """Read a text.

    Args:
        path: UTF-8 file.

    Raises:
        UsageError: the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give a UTF-8 text file") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8 first") from None


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
    count = len(window_nll)
    mean = math.fsum(window_nll) / count
    ppl = _exp(mean)
    if count < 2:
        return Estimate(ppl, None)
    variance = math.fsum((m - mean) ** 2 for m in window_nll) / (count - 1)
    return Estimate(ppl, ppl * math.sqrt(variance / count))


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


def held(score: Callable[[Sequence[int], float], tuple[float, float]], bits: float, budget: Budget) -> Scorer:
    """A scorer that holds the average of bits over the windows, as a governor does over tokens.

    Args:
        score: (tokens of a window, bits to ask for) -> the result of a Scorer.
        bits: average bits per weight to hold.
        budget: range of what may be asked for.
    """
    trim = BudgetTrim(bits)

    def scored(window: Sequence[int]) -> tuple[float, float]:
        nonlocal trim
        nll, used = score(window, trim.request(budget.min_bits, budget.max_bits))
        trim = trim.after(used, len(window))
        return nll, used

    return scored


def load_reference() -> ReferenceScorer:
    """The function that scores windows with an original model.

    Raises:
        UsageError: the workstation side, which has it, is not installed.
    """
    try:
        scorer: ReferenceScorer = import_module(REFERENCE_MODULE).window_nll
    except ImportError as error:
        raise UsageError(
            f"a reference model needs the workstation side, which is not installed ({error}): "
            "pip install 'mbq-export[export]'"
        ) from None
    return scorer


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf
