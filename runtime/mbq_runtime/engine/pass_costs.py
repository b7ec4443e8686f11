"""What passes of a model cost: timed once, kept between runs, and corrected by the passes of replies."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.manifest import bundle_hash
from mbq_runtime.cache import cache_dir
from mbq_runtime.machine import machine_name
from mbq_runtime.version import installed_version
from mbq_runtime.whole_file import write_whole

from .allowance import Allowance
from .backend import Backend

log = logging.getLogger(__name__)

MOST_TOKENS = 8
"""Tokens of the longest pass that is timed: the last token and seven guesses."""

_SIZES = (1, 2, 4, MOST_TOKENS)  # passes that are timed
_TIMES = 3
_ENOUGH_S = 0.3  # a slow board times each pass once
_LESS, _MORE = 0.3, 0.1  # weight of a pass that took less, or more, than others of its size: other work only adds time
_ODD = 2.0  # a time that differs by more than this factor counts as if by this factor
_MOST_BYTES = 4096


class PassCosts:
    """Seconds of a pass, by the number of its tokens and by its budget.

    sizes: numbers of tokens, from 1 up.
    bits: two budgets in average bits per weight, the lower one first.
    seconds: float64 [2, sizes].
    """

    def __init__(self, sizes: tuple[int, ...], bits: tuple[float, float], seconds: NDArray[np.float64]) -> None:
        self.sizes, self.bits, self.seconds = sizes, bits, seconds
        counts = range(MOST_TOKENS + 1)
        low, high = (np.interp(counts, sizes, row).tolist() for row in seconds)
        self._low: list[float] = low
        self._high: list[float] = high
        # What a pass of one token takes now, over what it took: the board or the length of the context has changed.
        self._all = 0.0
        # What other passes take besides, by their tokens.  At 0 are passes of one token at the lower budget.
        self._of_size = [1.0] * (MOST_TOKENS + 1)

    @classmethod
    def measure(cls, backend: Backend, budgets: tuple[Allowance, Allowance], vocab_size: int) -> PassCosts:
        """Time passes over random tokens, each with logits for all of its tokens: three times, or for 0.3 s.

        Args:
            backend: a loaded model.
            budgets: two, the lower one first.
            vocab_size: ids are below it.
        """
        budget, rng = np.zeros(2, np.float32), np.random.default_rng(0)
        context, end_s = backend.start(sum(_SIZES), budget), time.perf_counter() + _ENOUGH_S
        found = np.full((_TIMES, len(budgets), len(_SIZES)), np.inf)
        for turn in range(_TIMES):
            for row, of_row in enumerate(budgets):
                budget[:] = of_row.numbers
                for column, size in enumerate(_SIZES):
                    tokens = rng.integers(0, vocab_size, size, np.int32)
                    start_s = time.perf_counter()
                    context.append(tokens, size)
                    context.logits()
                    found[turn, row, column] = time.perf_counter() - start_s
                context.rewind(0)
            if time.perf_counter() > end_s:
                break
        return cls(_SIZES, (budgets[0].bits, budgets[1].bits), found.min(0))

    def at(self, tokens: int, avg_bits: float) -> float:
        """Seconds of a pass.

        Args:
            tokens: how many, 1 to ``MOST_TOKENS``.
            avg_bits: its budget.
        """
        return self._timed(tokens, avg_bits) * (self._all or 1.0) * self._of_size[self._place(tokens, avg_bits)]

    def _timed(self, tokens: int, avg_bits: float) -> float:
        low, high = self._low[tokens], self._high[tokens]
        share = (avg_bits - self.bits[0]) / (self.bits[1] - self.bits[0]) if self.bits[1] > self.bits[0] else 1.0
        return low + (high - low) * min(max(share, 0.0), 1.0)

    def _place(self, tokens: int, avg_bits: float) -> int:
        return 0 if tokens == 1 and avg_bits <= self.bits[0] else tokens

    def note(self, tokens: int, avg_bits: float, seconds: float) -> None:
        """Learn from a pass of a reply.

        Args:
            tokens: how many, 1 to ``MOST_TOKENS``.
            avg_bits: its budget.
            seconds: its time, its logits included.
        """
        place = self._place(tokens, avg_bits)
        if place == 1 and not self._all:
            self._all = seconds / self._timed(tokens, avg_bits)
        change = min(max(seconds / self.at(tokens, avg_bits), 1 / _ODD), _ODD) - 1
        change = 1 + change * (_LESS if change < 0 else _MORE)
        if place == 1:
            self._all *= change
        else:
            self._of_size[place] *= change

    def best_count(self, acceptance: float, guess_s: float, avg_bits: float, counts: range) -> int:
        """How many guesses give the most tokens a second.

        With a share a kept, k guesses give 1 + a + ... + a^k tokens.

        Args:
            acceptance: share of guesses that are kept.
            guess_s: seconds that a guess takes.
            avg_bits: budget of the check.
            counts: from which to choose; the lower of two equal ones is taken.
        """
        best, highest, tokens = counts[0], 0.0, 0.0
        for count in range(counts[-1] + 1):
            tokens += acceptance**count
            speed = tokens / (count * guess_s + self.at(count + 1, avg_bits))
            if count in counts and speed > highest:
                best, highest = count, speed
        return best


def place(folder: Path, engine: str, threads: int, bits: tuple[float, float]) -> Path:
    """The file that keeps the costs of a bundle on this machine.

    Args:
        folder: of the bundle.
        engine: kind of engine.
        threads: its processor threads.
        bits: the two budgets.
    """
    key = json.dumps([bundle_hash(folder), engine, threads, bits, machine_name(), installed_version()])
    return cache_dir() / "pass-costs" / f"{sha256(key.encode()).hexdigest()[:32]}.json"


def save(costs: PassCosts, path: Path) -> None:
    """Write the file, whole or not at all.  A failure is logged, since nothing depends on the file.

    Args:
        costs: what is known.
        path: the file; its folder is created.
    """
    text = json.dumps({"sizes": costs.sizes, "bits": costs.bits, "seconds": costs.seconds.tolist()})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())
    except OSError as error:
        log.info("%s: the times of passes are not kept (%s)", path, error.strerror)


def load(path: Path) -> PassCosts | None:
    """Read the file; None where there is none, or it cannot be used.

    Args:
        path: the file.
    """
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES} bytes")
        return _costs(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        log.warning("%s: ignored (%s); passes are timed again", path, error)
        return None


def _costs(found: Mapping[str, Any]) -> PassCosts:
    """Raises ValueError, KeyError or TypeError where a value is not one of a board."""
    seconds, (low, high) = np.asarray(found["seconds"], np.float64), found["bits"]
    if tuple(found["sizes"]) != _SIZES or seconds.shape != (2, len(_SIZES)):
        raise ValueError("other passes were timed")
    if not ((seconds > 1e-7) & (seconds < 1e3)).all() or not 0 < float(low) <= float(high) <= 8:
        raise ValueError("a time or a budget is out of range")
    return PassCosts(_SIZES, (float(low), float(high)), seconds)
