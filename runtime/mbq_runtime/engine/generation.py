"""One reply in the making: an iterator of text, and the figures that go with it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mbq_runtime.errors import UsageError

FinishReason = Literal["stop", "length", "closed"]

_MAX_SEED = 2**31 - 1


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when to stop.

    max_tokens: at least 1; temperature: 0 takes the likeliest token, higher is more varied;
    top_k: choose among this many tokens, 0 among all; top_p: in (0, 1], 1 among all;
    seed: None for a different reply each time; stop: texts that end the reply and are not part of it.
    Raises UsageError for a value outside these.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rules = (
            (self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1"),
            (math.isfinite(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "0 or above"),
            (self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or above"),
            (0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1"),
            (self.seed is None or 0 <= self.seed <= _MAX_SEED, "seed", self.seed, f"0 to {_MAX_SEED}"),
            (all(self.stop), "stop", self.stop, "texts that are not empty"),
        )
        for holds, name, value, needed in rules:
            if not holds:
                raise UsageError(f"{name} {value!r}: needed {needed}")

    def search_options(self, vocab_size: int) -> dict[str, bool | int | float]:
        """The engine's names for these choices."""
        if self.temperature == 0:
            return {"do_sample": False}
        seed = {} if self.seed is None else {"random_seed": self.seed}
        top_k = min(self.top_k, vocab_size)
        return {"do_sample": True, "temperature": self.temperature, "top_k": top_k, "top_p": float(self.top_p), **seed}


@dataclass(frozen=True)
class GenerationStats:
    """Figures of a reply, so far or at its end.

    tokens: ids of the reply, without the id that ended it; bits: for each pass that gave a token,
    the average bits per weight it used (the ending pass included, so there may be one more than
    tokens); prompt_bits: the same over the prompt's tokens; ttft_s: seconds from the start to the
    first token; tokens_per_s: decoding speed, passes after the first token over their own seconds
    (0 until there is one); finish_reason: "stop" (end token or stop text), "length", "closed" by
    the caller, or None while it runs.
    """

    prompt_tokens: int
    tokens: tuple[int, ...]
    bits: tuple[float, ...]
    prompt_bits: float
    ttft_s: float
    tokens_per_s: float
    finish_reason: FinishReason | None

    @property
    def avg_bits_used(self) -> float:
        """Mean over the passes that gave the reply's tokens; 0 before the first."""
        return math.fsum(self.bits) / len(self.bits) if self.bits else 0.0


@dataclass(frozen=True)
class Step:
    """One token: its id, the bits its pass used, its text (may be empty), and whether it ends the reply."""

    token: int
    bits: float
    text: str
    ends: bool


@dataclass
class Record:
    """What a running reply accumulates.  stopping: set by any thread, seen before the next pass."""

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    bits: list[float] = field(default_factory=list)
    prompt_bits: float = 0.0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    finish_reason: FinishReason | None = None
    stopping: bool = False

    def freeze(self) -> GenerationStats:
        passes = len(self.bits) - 1
        return GenerationStats(
            self.prompt_tokens,
            tuple(self.tokens),
            tuple(self.bits),
            self.prompt_bits,
            self.ttft_s,
            passes / self.decode_s if passes > 0 and self.decode_s > 0 else 0.0,
            self.finish_reason,
        )


StepSource = Callable[[Record], Generator[Step, None, None]]
TokenListener = Callable[[float, float], None]
"""Called after each decoded token but the first, with the seconds of its pass and the average bits it used."""


class Generation:
    """Iterate over it for the reply's text, piece by piece; ``stats`` holds the figures at any time.

    Nothing runs until the first piece is asked for.  An engine runs one at a time; a reply that is
    dropped, closed or read to its end makes way for the next.
    """

    def __init__(self, source: StepSource, prompt_tokens: int, stop: Sequence[str], tell: TokenListener) -> None:
        self._record = Record(prompt_tokens)
        self._pieces = _pieces(source, self._record, stop, tell)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def text(self) -> str:
        """Run to the end and return the pieces not yet taken as one text."""
        return "".join(self)

    def stop(self) -> None:
        """From any thread: end the reply before its next token, or before the next part of a long prompt."""
        self._record.stopping = True

    def close(self) -> None:
        """Stop here and free the engine; asking for more pieces then ends at once."""
        self._pieces.close()
        self._record.finish_reason = self._record.finish_reason or "closed"

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def stats(self) -> GenerationStats:
        return self._record.freeze()


def _pieces(source: StepSource, record: Record, stop: Sequence[str], tell: TokenListener) -> Generator[str, None, None]:
    """Time the steps, book them in ``record``, and yield text that no stop text can still claim."""
    held = ""
    steps = source(record)
    start_s = time.perf_counter()
    try:
        for step in steps:
            spent_s = time.perf_counter() - start_s
            if record.bits:
                record.decode_s += spent_s
                tell(spent_s, step.bits)
            else:
                record.ttft_s = spent_s
            record.bits.append(step.bits)
            if step.ends:
                record.finish_reason = "stop"
                break
            record.tokens.append(step.token)
            held += step.text
            cut = min((at for text in stop if (at := held.find(text)) >= 0), default=-1)
            if cut >= 0:
                record.finish_reason = "stop"
                held = held[:cut]
                break
            ready = len(held) - _claimed(held, stop)
            if ready:
                yield held[:ready]
                held = held[ready:]
            start_s = time.perf_counter()
        else:
            record.finish_reason = "closed" if record.stopping else "length"
    finally:
        steps.close()  # frees the engine before the last text goes out
    if held:
        yield held


def _claimed(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of ``text`` may be the beginning of a stop text."""
    return max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
