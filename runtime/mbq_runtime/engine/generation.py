"""One reply: an iterator over its text, and its figures."""

from __future__ import annotations

import inspect
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Literal, NamedTuple

from mbq_runtime.errors import UsageError

FinishReason = Literal["stop", "length", "closed"]

_MAX_SEED = 2**31 - 1
MIN_TEMPERATURE = 1e-5
"""Temperatures below this one take the likeliest token: the scores divided by them leave the range of a float."""


class Likelihood(NamedTuple):
    """How likely the model found a token, before penalties, bias and temperature.

    token: its id.
    logprob: natural logarithm of its probability.
    top: the likeliest tokens, each with its id and its logarithm; the likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when a reply stops.

    The steps, in this order: bias, penalties, temperature, top_k, top_p, min_p.

    max_tokens: most tokens of a reply, at least 1.
    temperature: below 1e-5 takes the likeliest token; a higher value is more varied.
    top_k: choose among this many likeliest tokens; 0 among all.
    top_p: choose among the likeliest tokens of this total probability, above 0 and at most 1.
    seed: repeats a varied reply, 0 to 2147483647; None for a different one each time.
    stop: texts that end a reply and are not part of it.
    min_p: leave out tokens less likely than this share of the likeliest one, 0 to 1.
    repetition_penalty: divides positive scores of the tokens of prompt and reply, and multiplies negative ones.
    presence_penalty: taken from the score of each token of the reply, -2 to 2.
    frequency_penalty: taken from the score of a token each time that the reply has it, -2 to 2.
    logit_bias: what is added to the scores of tokens, by id, each -100 to 100.
    logprobs: how many of the likeliest tokens to report at each step, besides the chosen one; None for no report.

    Raises:
        UsageError: a value is out of range, or no whole number where one is needed.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k", "seed", "logprobs"):
            value = getattr(self, name)
            if not isinstance(value, Integral) and not (value is None and name in ("seed", "logprobs")):
                raise UsageError(f"{name} {value!r}: needed a whole number")
        bias = next((value for value in self.logit_bias.values() if not -100 <= value <= 100), 0.0)
        rules = (
            (self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1"),
            (math.isfinite(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "0 or above"),
            (self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or above"),
            (0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1"),
            (self.seed is None or 0 <= self.seed <= _MAX_SEED, "seed", self.seed, f"0 to {_MAX_SEED}"),
            (all(self.stop), "stop", self.stop, "texts that are not empty"),
            (0 <= self.min_p <= 1, "min_p", self.min_p, "0 to 1"),
            (0 < self.repetition_penalty <= 10, "repetition_penalty", self.repetition_penalty, "above 0, at most 10"),
            (-2 <= self.presence_penalty <= 2, "presence_penalty", self.presence_penalty, "-2 to 2"),
            (-2 <= self.frequency_penalty <= 2, "frequency_penalty", self.frequency_penalty, "-2 to 2"),
            (not bias, "logit_bias", bias, "values from -100 to 100"),
            (self.logprobs is None or self.logprobs >= 0, "logprobs", self.logprobs, "0 or above"),
        )
        for holds, name, value, needed in rules:
            if not holds:
                raise UsageError(f"{name} {value!r}: needed {needed}")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < MIN_TEMPERATURE


@dataclass(frozen=True)
class GenerationStats:
    """Figures of a reply, so far or at its end.

    prompt_tokens: number of tokens in the prompt.
    tokens: ids of the reply, without the id that ended it.
    bits: average bits per weight of each pass that gave a token.  The pass that gave the end token counts, so there may
        be one more than tokens.
    prompt_bits: average bits per weight, mean over the prompt's tokens that were read.
    cached_tokens: tokens of the prompt that the session had kept, so that they were not read.
    ttft_s: seconds from the start to the first token.
    tokens_per_s: decoding speed: passes after the first token, divided by their seconds; None before there is one.
    finish_reason: "stop" (end token or stop text), "length", "closed" (by the caller), or None while the reply runs.
    likelihoods: one for each of the tokens, where ``logprobs`` asked for them.
    guessed: tokens that were guessed and checked, see ``Engine.speculate``.
    kept_guesses: guesses that are part of the reply.
    stop_text: the stop text that ended the reply; None where something else did.
    reasoning_tokens: tokens of the model's reasoning.
    """

    prompt_tokens: int
    tokens: tuple[int, ...]
    bits: tuple[float, ...]
    prompt_bits: float
    cached_tokens: int
    ttft_s: float
    tokens_per_s: float | None
    finish_reason: FinishReason | None
    likelihoods: tuple[Likelihood, ...] = ()
    guessed: int = 0
    kept_guesses: int = 0
    stop_text: str | None = None
    reasoning_tokens: int = 0

    @property
    def avg_bits_used(self) -> float:
        """Average bits per weight, mean over the passes in ``bits``; 0 before the first."""
        return math.fsum(self.bits) / len(self.bits) if self.bits else 0.0


def speed_text(stats: GenerationStats) -> str:
    """The decoding speed for people.

    Args:
        stats: of the reply.
    """
    return "speed unknown" if stats.tokens_per_s is None else f"{stats.tokens_per_s:.1f} tokens/s"


@dataclass(frozen=True)
class Step:
    """One token.

    token: its id.
    bits: average bits per weight of its pass.
    text: the text that it completes; with the last token of a reply, also what was not complete.
    ends: whether it is an end token.
    likelihood: where it was asked for.
    of_pass: how many tokens its pass gave; 0 for those after the first of them.
    """

    token: int
    bits: float
    text: str
    ends: bool
    likelihood: Likelihood | None = None
    of_pass: int = 1


@dataclass
class Record:
    """The figures of a running reply.

    prompt_tokens: number of tokens in the prompt.
    tokens: ids of the reply so far.
    bits: average bits per weight of each pass that gave a token.
    prompt_bits: average bits per weight of the prompt so far, mean over all its tokens that must be read.
    cached_tokens: tokens of the prompt that need not be read.
    ttft_s: seconds to the first token.
    decode_s: seconds of the passes after the first token.
    finish_reason: why the reply ended; None while it runs.
    stopping: set by any thread; the reply ends before its next pass.
    likelihoods: one for each of the tokens, where they were asked for.
    guessed: tokens that were guessed and checked.
    kept_guesses: guesses that are part of the reply.
    stop_text: the stop text that ended the reply.
    reasoning_tokens: tokens of the model's reasoning.
    """

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    bits: list[float] = field(default_factory=list)
    prompt_bits: float = 0.0
    cached_tokens: int = 0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    finish_reason: FinishReason | None = None
    stopping: bool = False
    likelihoods: list[Likelihood] = field(default_factory=list)
    guessed: int = 0
    kept_guesses: int = 0
    stop_text: str | None = None
    reasoning_tokens: int = 0

    def freeze(self) -> GenerationStats:
        """The figures at this moment."""
        passes = len(self.bits) - 1
        return GenerationStats(
            self.prompt_tokens,
            tuple(self.tokens),
            tuple(self.bits),
            self.prompt_bits,
            self.cached_tokens,
            self.ttft_s,
            passes / self.decode_s if passes > 0 and self.decode_s > 0 else None,
            self.finish_reason,
            tuple(self.likelihoods),
            self.guessed,
            self.kept_guesses,
            self.stop_text,
            self.reasoning_tokens,
        )


StepSource = Callable[[Record], Generator[Step, None, None]]
TokenListener = Callable[[float, float], None]
"""Called after each decoded token but the first, with its seconds and the average bits it used.  The tokens of one pass
share its time."""


class Generation:
    """A reply: an iterator over pieces of its text.  ``Engine.generate`` makes it.

    Nothing runs until the first piece is asked for.  An engine runs one reply at a time.  A reply that is read to its
    end, closed or deleted frees the engine.

    source: makes the steps of the reply.
    prompt_tokens: number of tokens in the prompt.
    stop: texts that end the reply.
    tell: called after each token but the first.

    >>> from mbq_runtime import Engine
    >>> with Engine.load("my-bundle").generate("Hello", max_tokens=4) as reply:
    ...     list(reply)
    ['H', 'i', ',', ' ']
    >>> len(reply.stats.tokens), reply.stats.avg_bits_used > 7.9
    (4, True)
    """

    def __init__(self, source: StepSource, prompt_tokens: int, stop: Sequence[str], tell: TokenListener) -> None:
        self._record = Record(prompt_tokens)
        self._turn = threading.RLock()  # held by the thread that runs the steps
        self._pieces = _pieces(source, self._record, stop, tell)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        with self._turn:
            return next(self._pieces)

    def text(self) -> str:
        """Run to the end, and return the rest of the text."""
        return "".join(self)

    def stop(self) -> None:
        """End the reply before its next token, or before the next part of a long prompt.  From any thread."""
        self._record.stopping = True

    def close(self) -> None:
        """End the reply and free the engine.  There are no more pieces.

        From any thread: while another thread waits for a piece, this waits until that piece is there.
        """
        self._record.stopping = True
        with self._turn:
            # A listener calls on the thread that runs the steps.  The reply then ends before its next token.
            if inspect.getgeneratorstate(self._pieces) != inspect.GEN_RUNNING:
                self._pieces.close()
        self._record.finish_reason = self._record.finish_reason or "closed"

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def stats(self) -> GenerationStats:
        """The figures at this moment."""
        return self._record.freeze()


def _pieces(source: StepSource, record: Record, stop: Sequence[str], tell: TokenListener) -> Generator[str, None, None]:
    """Run the steps, write their figures into ``record``, and yield text that cannot be part of a stop text."""
    held = ""
    steps = source(record)
    start_s, spent_s = time.perf_counter(), 0.0
    try:
        for step in steps:
            if step.of_pass:  # the tokens of one pass share its time
                spent_s = (time.perf_counter() - start_s) / step.of_pass
            if record.bits:
                record.decode_s += spent_s
                tell(spent_s, step.bits)
            else:
                record.ttft_s = spent_s
            record.bits.append(step.bits)
            if not step.ends:
                record.tokens.append(step.token)
                if step.likelihood is not None:
                    record.likelihoods.append(step.likelihood)
            held += step.text
            cut, text = min(((at, text) for text in stop if (at := held.find(text)) >= 0), default=(-1, None))
            if text is not None:
                record.finish_reason, record.stop_text = "stop", text
                held = held[:cut]
                break
            if step.ends:
                record.finish_reason = "stop"
                break
            ready = len(held) - _claimed(held, stop)
            if ready:
                yield held[:ready]
                held = held[ready:]
            start_s = time.perf_counter()
        else:
            record.finish_reason = "closed" if record.stopping else "length"
    finally:
        steps.close()  # frees the engine before the last text is yielded
    if held:
        yield held


def _claimed(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of ``text`` may be the beginning of a stop text."""
    return max((_overlap(text, one) for one in stop), default=0)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``, and is not all of it."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(text[at:]):
            return len(text) - at
        at = text.find(stop[0], at + 1)
    return 0
