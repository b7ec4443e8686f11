"""Scores of a text: the passes that give each of its tokens logits, and what is computed from those logits.

A text is read in passes of ``scoring_chunk`` tokens, so that few logits are held at a time.  ``read_passes`` makes the
passes.  ``join_logits``, ``rate``, ``rate_tokens`` and ``compare`` go through them once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.errors import UsageError
from mbq_runtime.fidelity import TokenFidelity, compare_tokens

from .allowance import Allowance
from .backend import Backend
from .generation import Likelihood
from .sampling import check_finite, likelihood

SCORING_LOGITS_BYTES = 32 << 20
"""Bound on the float32 logits of one pass of scoring, where every token of the pass has logits."""

_MIN_CHUNK = 16  # tokens
_ROWS = 64  # bounds the temporary exponentials


class Score(NamedTuple):
    """How well a model predicts a text.

    nll: mean negative log-likelihood in nats of each token but the first, given those before it.
    avg_bits_used: average bits per weight, mean over tokens.
    """

    nll: float
    avg_bits_used: float


class Window(NamedTuple):
    """The logits of a text.

    logits: float32 [S, vocab].
    avg_bits_used: average bits per weight, mean over tokens.
    """

    logits: NDArray[np.float32]
    avg_bits_used: float


class Passes(NamedTuple):
    """Timed passes.

    seconds: duration of each pass.
    avg_bits_used: average bits per weight, mean over all tokens.
    """

    seconds: tuple[float, ...]
    avg_bits_used: float


class Pass(NamedTuple):
    """One pass over a part of a text.

    start: position in the text of the first token of the part.
    logits: float32 [n, vocab], of the n tokens of the part.  Valid until the next pass.
    bits: average bits per weight, mean over the tokens of the part.
    """

    start: int
    logits: NDArray[np.float32]
    bits: float


def scoring_chunk(vocab_size: int, prompt_chunk: int) -> int:
    """Tokens of one pass of scoring: as many as keep the logits within SCORING_LOGITS_BYTES, a power of two.

    Args:
        vocab_size: logits of a token.
        prompt_chunk: most tokens of any pass; the result is never higher.

    >>> scoring_chunk(49152, 512), scoring_chunk(262144, 128), scoring_chunk(262144, 8)
    (128, 32, 8)
    """
    tokens = max(SCORING_LOGITS_BYTES // (4 * vocab_size), _MIN_CHUNK)
    return min(prompt_chunk, 1 << tokens.bit_length() - 1)


def mean_nll(logits: NDArray[np.float32], targets: NDArray[np.integer]) -> float:
    """Mean over rows of ``logsumexp(logits[i]) - logits[i, targets[i]]``, in nats.

    Args:
        logits: float32 [S, V].
        targets: integers [S], each from 0 to V - 1.

    >>> round(mean_nll(np.zeros((2, 4), np.float32), np.array([0, 3])), 4)  # log(4): all four are as likely
    1.3863
    """
    total = 0.0
    for start in range(0, len(targets), _ROWS):
        rows = logits[start : start + _ROWS]
        peak = rows.max(axis=1, keepdims=True)
        norm = np.log(np.exp(rows - peak).sum(axis=1, dtype=np.float64)) + peak[:, 0]
        picked = np.take_along_axis(rows, np.asarray(targets[start : start + _ROWS])[:, None].astype(np.int64), axis=1)
        total += float((norm - picked[:, 0]).sum())
    return total / len(targets)


def read_passes(backend: Backend, ids: NDArray[np.int32], budget: Allowance, chunk: int) -> Iterator[Pass]:
    """Read a text in one context that is empty before.

    Args:
        backend: a loaded model.
        ids: int32 [S].
        budget: of every pass.
        chunk: most tokens of a pass.
    """
    context = backend.start(len(ids), budget.numbers)
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        context.append(part, len(part))
        yield Pass(start, context.logits(), context.bits_used())


def join_logits(passes: Iterable[Pass]) -> Window:
    """The logits of all tokens of a text.

    Args:
        passes: over the text.
    """
    parts, bits = [], 0.0
    for _, logits, used in passes:
        parts.append(logits.copy())
        bits += used * len(logits)
    joined = np.concatenate(parts)
    return Window(joined, bits / len(joined))


def rate(tokens: Sequence[int], passes: Iterable[Pass]) -> Score:
    """How well the model predicts a text.

    Args:
        tokens: at least 2 ids.
        passes: over them.
    """
    nll, bits = 0.0, 0.0
    for start, logits, used in passes:
        targets = np.asarray(tokens[start + 1 : start + 1 + len(logits)], np.int64)
        nll += mean_nll(logits[: len(targets)], targets) * len(targets) if len(targets) else 0.0
        bits += used * len(logits)
    return Score(nll / (len(tokens) - 1), bits / len(tokens))


def rate_tokens(
    tokens: Sequence[int], passes: Iterable[Pass], count: int, where: object = "the bundle"
) -> list[Likelihood]:
    """How likely each token of a text is, given those before it.

    Args:
        tokens: at least 1 id.
        passes: over them.
        count: how many of the likeliest tokens are told besides.
        where: the bundle, for messages.

    Returns:
        One for each token.  That of the first, before which there is nothing, is NaN.

    Raises:
        BundleError: the logits are not finite.
    """
    found = [Likelihood(int(tokens[0]), math.nan, ())]
    for start, logits, _ in passes:
        following = tokens[start + 1 : start + 1 + len(logits)]
        for row, token in zip(logits, following, strict=False):
            check_finite(row, where)
            found.append(likelihood(row, int(token), count))
    return found


def compare(
    tokens: Sequence[int], passes: Iterable[Pass], original: NDArray[np.float32], path: Path
) -> tuple[TokenFidelity, float]:
    """Compare the model with the original that it was made of, on a text.

    Args:
        tokens: at least 2 ids, S of them.
        passes: over them.
        original: the original model's logits on the same tokens, float32 [S, vocab].
        path: folder of the bundle, for messages.

    Returns:
        The comparison at the S - 1 positions before a token, and the average bits used.

    Raises:
        UsageError: the original has another vocabulary.
    """
    parts, bits = [], 0.0
    for start, logits, used in passes:
        if original.shape != (len(tokens), logits.shape[1]):
            raise UsageError(
                f"{path}: the reference has {original.shape[1]} words in its vocabulary, the bundle has "
                f"{logits.shape[1]}; give the model that the bundle was made of"
            )
        targets = tokens[start + 1 : start + 1 + len(logits)]
        if targets:
            parts.append(compare_tokens(logits[: len(targets)], original[start:][: len(targets)], targets))
        bits += used * len(logits)
    return TokenFidelity(*(np.concatenate(part) for part in zip(*parts, strict=True))), bits / len(tokens)


def time_passes(
    backend: Backend, ids: NDArray[np.int32], sizes: Sequence[int], budget: Allowance, chunk: int
) -> Passes:
    """Time passes in one context that is empty before.  Only the last token of a pass has logits.

    Args:
        backend: a loaded model.
        ids: int32 [n], as many as the sizes together.
        sizes: tokens that each pass adds to the context.
        budget: of every pass.
        chunk: most tokens that the model reads at once; a larger pass is divided.
    """
    seconds, bits, start = [], 0.0, 0
    context = backend.start(len(ids), budget.numbers)
    for size in sizes:
        begin_s = time.perf_counter()
        for at in range(start, start + size, chunk):
            part = ids[at : min(at + chunk, start + size)]
            context.append(part)
            bits += context.bits_used() * len(part)
        seconds.append(time.perf_counter() - begin_s)
        start += size
    return Passes(tuple(seconds), bits / len(ids))
