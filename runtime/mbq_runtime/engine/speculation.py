"""Speculation: guesses of the next tokens, which one pass of the model checks together.

A guess comes from the text so far (what followed the same tokens before), or from the model itself at its lowest
budget.  The check reads the guesses at the budget that was asked for, and chooses a token after each as if it were the
only one.  A guess that is the chosen token is kept.  At the first one that is not, the chosen token takes its place,
and the rest is dropped.  So the reply is the one without guesses, for varied replies too: a token depends on its
scores and on random numbers of its place in the reply, and on nothing that was guessed.

Guesses of the model are chosen with the same random numbers as the tokens themselves, so that both often agree.
(M. Daliri, C. Musco, A. T. Suresh: Coupling without Communication and Drafter-Invariant Speculative Decoding, 2024.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.errors import BundleError, GrammarError, UsageError

from .kept_context import KeptContext
from .pass_costs import MOST_TOKENS, PassCosts
from .sampling import Sampler

Mode = Literal["off", "on", "auto"]
"""off: no guesses; on: guesses always; auto: guesses where they are expected to save time."""

MOST_GUESSES = MOST_TOKENS - 1
"""Guesses of a round.  The pass that checks them has one token more."""

_MATCHES = {5: 0.85, 3: 0.5, 2: 0.3}
"""How many of the last tokens came before -> the share of guesses that is expected at first.  The longest counts."""

_PRIOR = 8.0  # guesses for which the first estimate stands
_FADE = 0.95  # weight of what was seen one round ago
_PLAIN = 16  # one round of so many has no guess, the first one too: what a token costs must be known
_LEAST_BITS = 1.0  # the model guesses with a budget that is lower by at least this


def check_mode(mode: str) -> Mode:
    """Refuse a mode that does not exist.

    Args:
        mode: what was asked for.

    Raises:
        UsageError: there is no such mode.
    """
    found = next((known for known in get_args(Mode) if known == mode), None)
    if found is None:
        raise UsageError(f"speculate {mode!r}: needed one of {', '.join(get_args(Mode))}")
    kept: Mode = found
    return kept


def checked(
    rows: NDArray[np.float32], guesses: Sequence[int], sampler: Sampler, end_tokens: frozenset[int]
) -> list[int]:
    """The tokens of a pass: one after each guess that is right, and one more.

    Args:
        rows: float32 [1 + guesses, vocab], the logits after the last token and after each guess.
        guesses: ids.
        sampler: chooses the tokens.
        end_tokens: ids after which there is no token.
    """
    tokens: list[int] = []
    for logits, guess in zip(rows, [*guesses, None], strict=True):
        tokens.append(sampler.choose(logits))
        if tokens[-1] != guess or guess in end_tokens:
            break
    return tokens


class LookUp:
    """Guesses what followed the last tokens when they came before.

    tokens: the prompt.

    >>> found = LookUp([1, 2, 3, 4, 5, 1, 2, 3])
    >>> found.match(), found.guess(2)
    (3, [4, 5])
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = list(tokens)
        self._follows: dict[tuple[int, ...], int] = {}  # where the token after these tokens is
        self._indexed = 0  # tokens whose place is in it

    def add(self, token: int) -> None:
        """Add a token of the reply.

        Args:
            token: its id.
        """
        self._tokens.append(token)

    def _index(self) -> None:
        """Note the places of the tokens that came since the last look."""
        for at in range(self._indexed, len(self._tokens)):
            for count in _MATCHES:
                if at >= count:
                    self._follows[tuple(self._tokens[at - count : at])] = at
        self._indexed = len(self._tokens)

    def match(self) -> int:
        """How many of the last tokens have come before, a key of ``_MATCHES``; 0: too few."""
        self._index()
        return next((count for count in _MATCHES if tuple(self._tokens[-count:]) in self._follows), 0)

    def guess(self, most: int) -> list[int]:
        """The next tokens; none where the last ones are new.

        Args:
            most: most tokens.
        """
        at = self._follows.get(tuple(self._tokens[-self.match() :]), len(self._tokens))
        return self._tokens[at : at + most]


class Acceptance:
    """The share of guesses that are kept.  What was seen last counts most.

    first: estimate before anything was seen.
    """

    def __init__(self, first: float) -> None:
        self._kept, self._seen = first * _PRIOR, _PRIOR

    def note(self, kept: int, guessed: int) -> None:
        """Count a round.  Guesses after the first wrong one say nothing.

        Args:
            kept: guesses that were kept.
            guessed: guesses of the round, at least 1.
        """
        self._kept = _FADE * self._kept + kept
        self._seen = _FADE * self._seen + min(kept + 1, guessed)

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return self._kept / self._seen


class Guesser:
    """The guesses of one reply.

    prompt: ids.
    mode: gives the mode of this moment.
    costs: gives the costs of this model's passes; called where the mode is not "off".  None: nothing is guessed.
    end_tokens: ids after which nothing is guessed.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        mode: Callable[[], Mode],
        costs: Callable[[], PassCosts | None],
        end_tokens: frozenset[int],
    ) -> None:
        self._look_up, self._mode, self._costs, self._end_tokens = LookUp(prompt), mode, costs, end_tokens
        self._found = {count: Acceptance(share) for count, share in _MATCHES.items()}
        self._own = self._last = Acceptance(0.7)
        self._rounds = 0

    def guess(self, context: KeptContext, token: int, sampler: Sampler, most: int) -> list[int]:
        """Guess what follows a token.  The context is as before afterwards.

        Args:
            context: the tokens so far.
            token: the last one, which is not in the context yet.
            sampler: its state after that token.
            most: most guesses.
        """
        self._look_up.add(token)
        mode = self._mode()
        if mode == "off":
            return []
        counts, bits = range(1 if mode == "on" else 0, min(most, MOST_GUESSES) + 1), context.avg_bits
        if not len(counts):
            return []
        costs = self._costs()
        self._rounds += 1
        if costs is None or (mode == "auto" and self._rounds % _PLAIN == 1):
            return []
        if match := self._look_up.match():
            self._last = self._found[match]
            found = self._look_up.guess(costs.best_count(self._last.share, 0.0, bits, counts))
            if found:
                return found
        low = costs.bits[0]
        if bits < low + _LEAST_BITS:
            return []
        self._last = self._own
        count = costs.best_count(self._own.share, costs.at(1, low), bits, counts)
        return self._of_model(context, token, sampler.fork(), count, costs) if count else []

    def _of_model(self, context: KeptContext, token: int, sampler: Sampler, count: int, costs: PassCosts) -> list[int]:
        """What the model says at its lowest budget."""
        before, found = len(context), list[int]()
        try:
            while len(found) < count and token not in self._end_tokens:
                start_s = time.perf_counter()
                context.append([token], avg_bits=costs.bits[0])
                logits = context.logits()[0]
                costs.note(1, costs.bits[0], time.perf_counter() - start_s)
                token = sampler.choose(logits)
                found.append(token)
        except (BundleError, GrammarError):  # nothing that was guessed may end a reply
            pass
        context.rewind(before)
        return found

    def time(self, tokens: int, avg_bits: float, seconds: float) -> None:
        """Learn from the time of a pass, its logits included.

        Args:
            tokens: of the pass.
            avg_bits: its budget.
            seconds: its time.
        """
        if self._mode() != "off" and (costs := self._costs()) is not None:
            costs.note(tokens, avg_bits, seconds)

    def note(self, tokens: Sequence[int], guessed: int) -> None:
        """Learn from a check.

        Args:
            tokens: the tokens that the check gave: the guesses that were kept, and one more.
            guessed: guesses that were checked, at least 1.
        """
        for token in tokens[:-1]:
            self._look_up.add(token)
        self._last.note(len(tokens) - 1, guessed)
