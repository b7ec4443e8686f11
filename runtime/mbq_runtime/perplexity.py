"""Perplexity over the windows of a text: how well a budget predicts what comes next.

The text's tokens are cut into windows of ``context`` tokens that do not overlap; what is left over
at the end is dropped, so every window weighs the same.  Where not all are wanted, those taken are spread
evenly over the text: neighbours are of one article, and tell less than their number.  A model whose
tokenizer puts an opening token before every text gets it before every window, within its ``context``
tokens.  Of each window tokens 1 to context - 1 are predicted from those before them in the window.
With m_w the mean negative log-likelihood of window w, in nats, over W windows::

    mean   = sum(m_w) / W
    ppl    = exp(mean)
    stderr = ppl * sqrt(sum((m_w - mean)**2) / (W - 1) / W)

The standard error is over windows, not tokens: tokens of one window are not independent.  It carries
the error of the mean over to the exponential (delta method), and needs two windows.
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

REFERENCE_MODULE = "mbq_export.reference_ppl"
"""Where the ReferenceScorer ``window_nll`` is found, if the workstation side is installed."""

Windows = Sequence[Sequence[int]]
Scorer = Callable[[Sequence[int]], tuple[float, float]]
"""One window's tokens -> (mean negative log-likelihood in nats, average bits used)."""
Progress = Callable[[int, int], None]
"""Called with (windows done, windows in all)."""
ReferenceScorer = Callable[[str, list[list[int]], Progress], list[float]]
"""(model, windows, progress) -> each window's mean negative log-likelihood in nats."""


@dataclass(frozen=True)
class Estimate:
    """ppl and its standard error; ``ppl_stderr`` is None when one window is all there is."""

    ppl: float
    ppl_stderr: float | None


@dataclass(frozen=True)
class Row:
    """One budget's line in the result."""

    bits: float
    avg_bits_used: float
    ppl: float
    ppl_stderr: float | None


def read_text(path: Path) -> str:
    """The UTF-8 text in ``path``.  Raises UsageError when it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give a UTF-8 text file") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8 first") from None


def cut_windows(
    tokens: Sequence[int], context: int, opening: Sequence[int] = (), limit: int | None = None
) -> list[list[int]]:
    """Windows of ``context`` tokens, each beginning with ``opening``; no more than ``limit``, spread evenly.

    Raises UsageError when the tokens do not fill one.
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
    """Perplexity and standard error from the windows' mean negative log-likelihoods (formulas above)."""
    count = len(window_nll)
    mean = math.fsum(window_nll) / count
    ppl = _exp(mean)
    if count < 2:
        return Estimate(ppl, None)
    variance = math.fsum((m - mean) ** 2 for m in window_nll) / (count - 1)
    return Estimate(ppl, ppl * math.sqrt(variance / count))


def measure(windows: Windows, bits: float, score: Scorer, progress: Progress | None = None) -> Row:
    """Score every window at one budget."""
    nll, used = [], []
    for done, window in enumerate(windows, 1):
        window_nll, window_bits = score(window)
        nll.append(window_nll)
        used.append(window_bits)
        if progress is not None:
            progress(done, len(windows))
    found = estimate(nll)
    return Row(bits, math.fsum(used) / len(used), found.ppl, found.ppl_stderr)


def held(score: Callable[[Sequence[int], float], tuple[float, float]], bits: float, budget: Budget) -> Scorer:
    """A scorer that holds the average of bits over the windows, as a running engine does over its tokens.

    score: a window's tokens and the bits to ask for -> as a Scorer; budget: what may be asked for.
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

    Raises UsageError when the workstation side, which holds it, is not installed.
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
