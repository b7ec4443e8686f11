"""Chooses a token from logits, for every kind of engine."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.errors import BundleError

from .generation import Likelihood, Sampling
from .grammar import Matcher
from .reasoning import Reasoning


def check_finite(logits: NDArray[np.float32], where: object) -> None:
    """Refuse to choose a token from logits that are no numbers.

    Args:
        logits: float32 [vocab].  -inf is permitted for tokens that are not the likeliest.
        where: the bundle, for the message.

    Raises:
        BundleError: a logit is NaN, or the largest one is infinite.
    """
    peak = float(logits.max())  # NaN where any of them is
    if not math.isfinite(peak):
        raise BundleError(f"{where}: the model's logits are not finite ({peak}); run mbq verify, or export it again")


LEAST_LOGPROB = -9999.0
"""What is told of a token that is impossible: JSON has no infinite numbers, and OpenAI's API has this one."""
_LEAST_NOISE = np.float32(1e-30)  # a quotient by it is finite


class Sampler:
    """Chooses one token of a reply after another.

    sampling: how; None for the likeliest token.
    prompt: int [n], ids that a repetition penalty counts.
    matcher: holds the reply to a grammar.
    where: the bundle, for messages.
    reasoning: follows the reply through its reasoning; None where there is none.

    >>> Sampler(None).choose(np.array([0.1, 2.0, 0.3], np.float32))
    1
    """

    def __init__(
        self,
        sampling: Sampling | None,
        prompt: Sequence[int] | NDArray[np.int32] = (),
        matcher: Matcher | None = None,
        where: object = "the bundle",
        reasoning: Reasoning | None = None,
    ) -> None:
        self._where, self._matcher, self._reasoning = where, matcher, reasoning
        self._sampling = s = sampling or Sampling()
        self._random = np.random.default_rng(s.seed)
        self._bias = np.array([*s.logit_bias], np.int64), np.array([*s.logit_bias.values()], np.float32)
        self._repeats = s.repetition_penalty != 1
        self._counts = s.presence_penalty != 0 or s.frequency_penalty != 0
        self._seen = set(np.asarray(prompt).tolist()) if self._repeats else set[int]()
        self._said: Counter[int] = Counter()

    def choose(self, logits: NDArray[np.float32]) -> int:
        """Choose a token.

        Args:
            logits: float32 [vocab]; they stay as they are.

        Returns:
            The token's id.

        Raises:
            BundleError: the logits are not finite.
            GrammarError: the grammar cannot be followed.
        """
        check_finite(logits, self._where)
        token = None if self._reasoning is None else self._reasoning.forced
        if token is None:
            token = self._draw(self._permitted(self.scores(logits)))
        reasons = self._reasoning is not None and self._reasoning.accept(token)
        if self._matcher is not None and not reasons:
            self._matcher.accept(token)
        if self._repeats:
            self._seen.add(token)
        if self._counts:
            self._said[token] += 1
        return token

    def _permitted(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """The scores, -inf for what the grammar does not permit."""
        if self._matcher is None or (self._reasoning is not None and self._reasoning.inside):
            return scores
        allowed = self._matcher.allowed()
        if self._reasoning is not None and self._reasoning.may_open is not None:
            allowed[self._reasoning.may_open] = True
        return np.where(allowed, scores, np.float32(-np.inf))

    def _draw(self, scores: NDArray[np.float32]) -> int:
        if self._sampling.is_greedy:
            return int(scores.argmax())
        # The shortest of the times exp(1) / weight: token i wins in weight_i of all cases.  The noise belongs to
        # the token and its place, so that two samplers in one state agree where their logits are alike.
        noise = self._random.standard_exponential(len(scores), np.float32)
        tokens, weights = candidates(scores, self._sampling)
        return int(tokens[(weights / np.maximum(noise[tokens], _LEAST_NOISE)).argmax()])

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of reasoning so far, its end included."""
        return 0 if self._reasoning is None else self._reasoning.tokens

    def fork(self) -> Sampler:
        """A sampler in the same state, which will draw the same.  Neither changes the other."""
        twin = copy.copy(self)
        twin._random = copy.deepcopy(self._random)
        twin._reasoning = copy.copy(self._reasoning)
        twin._matcher = None if self._matcher is None else self._matcher.fork()
        twin._seen, twin._said = set(self._seen), Counter(self._said)
        return twin

    def scores(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits with bias and penalties.

        Args:
            logits: float32 [vocab].

        Returns:
            float32 [vocab]; ``logits`` itself where nothing changes them.
        """
        s, (biased, bias) = self._sampling, self._bias
        if not (len(biased) or self._seen or self._said):
            return logits
        scores = logits.copy()
        scores[biased] += bias
        if self._seen:
            seen = np.fromiter(self._seen, np.int64)
            before = scores[seen]
            scores[seen] = np.where(before < 0, before * s.repetition_penalty, before / s.repetition_penalty)
        if self._said:
            said, times = (np.fromiter(part, np.float32) for part in (self._said.keys(), self._said.values()))
            scores[said.astype(np.int64)] -= s.presence_penalty + s.frequency_penalty * times
        return scores

    def likelihood(self, logits: NDArray[np.float32], token: int) -> Likelihood | None:
        """How likely a token was; None where ``logprobs`` does not ask for it.

        Args:
            logits: float32 [vocab], as for ``choose``.
            token: its id.
        """
        count = self._sampling.logprobs
        return None if count is None else likelihood(logits, token, count)


def likelihood(logits: NDArray[np.float32], token: int, count: int) -> Likelihood:
    """How likely a token is.

    Args:
        logits: float32 [vocab].  The largest one is finite.
        token: its id.
        count: how many of the likeliest tokens are told besides.

    Returns:
        Logarithms of at least ``LEAST_LOGPROB``.
    """
    peak = float(logits.max())
    total = peak + math.log(float(np.exp(logits - peak).sum(dtype=np.float64)))
    count = min(count, len(logits))
    top = np.argpartition(logits, len(logits) - count)[len(logits) - count :] if count else np.empty(0, np.int64)
    top = top[np.argsort(-logits[top], kind="stable")]

    def logprob(i: int) -> float:
        return max(float(logits[i]) - total, LEAST_LOGPROB)

    return Likelihood(token, logprob(token), tuple((int(i), logprob(i)) for i in top))


def candidates(logits: NDArray[np.float32], sampling: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The tokens that may be drawn, and how likely they are.

    Args:
        logits: float32 [vocab]; the largest one is finite.
        sampling: with a temperature that is not greedy.

    Returns:
        int64 [n]: ids; float32 [n]: weights, of which the largest is 1.
    """
    s = sampling
    scores = (logits - logits.max()) / np.float32(s.temperature)
    tokens = np.arange(len(scores))
    if 0 < s.top_k < len(scores):
        least = np.partition(scores, len(scores) - s.top_k)[len(scores) - s.top_k]
        tokens = np.flatnonzero(scores >= least)
    weights = np.exp(scores[tokens])
    if s.top_p < 1:
        # The tokens below this weight have less than 1 - top_p together, so only the others are sorted.
        likely = np.flatnonzero(weights >= (1 - s.top_p) * weights.sum(dtype=np.float64) / len(weights))
        order = likely[np.argsort(-weights[likely], kind="stable")]
        total = np.cumsum(weights[order], dtype=np.float64)
        # Keep the fewest tokens whose total probability reaches top_p.
        kept = int(np.searchsorted(total, s.top_p * weights.sum(dtype=np.float64))) + 1
        tokens, weights = tokens[order[:kept]], weights[order[:kept]]
    if s.min_p:
        kept_ones = weights >= s.min_p
        tokens, weights = tokens[kept_ones], weights[kept_ones]
    return tokens, weights
