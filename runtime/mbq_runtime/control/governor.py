"""The governor: it reads the sensors, runs the controller, and sets the budget of an engine during a reply."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Protocol, runtime_checkable

from mbq_runtime.bundle.manifest import Manifest
from mbq_runtime.sensing.readings import Readings

from .budget_trim import BudgetTrim
from .energy import Energy, describe_saving
from .events import Event
from .ladder import Ladder, climb
from .learned import Learned
from .policy import Policy
from .threads import Threads

log = logging.getLogger(__name__)

PERIOD_S = 0.4
"""Time between two looks at the sensors, in s."""
_OVERDUE_S = 1.5 * PERIOD_S  # without a token for this long the governor's own thread looks
_SAME_BITS = 1e-3  # engines keep the budget in single precision
_FORGET_S = 3.0  # a speed older than this, and older than three tokens, is forgotten


class Governed(Protocol):
    """What a governor needs of an engine.  ``avg_bits`` is the budget; it can be set from any thread."""

    avg_bits: float

    @property
    def manifest(self) -> Manifest:
        """The manifest of the engine's bundle."""


@runtime_checkable
class Telling(Protocol):
    """An engine that calls its listeners with (seconds, bits used) after each decoded token."""

    def add_listener(self, listener: Callable[[float, float], None]) -> None:
        """See ``Engine.add_listener``.

        Args:
            listener: called with the seconds of a token's pass and the bits it used.
        """

    def remove_listener(self, listener: Callable[[float, float], None]) -> None:
        """See ``Engine.remove_listener``.

        Args:
            listener: what ``add_listener`` was given.
        """


@runtime_checkable
class Threaded(Protocol):
    """An engine whose number of processor threads can be lowered from any thread."""

    threads: int


@runtime_checkable
class Speculating(Protocol):
    """An engine that can guess tokens: "off" or "auto", from any thread.  One that cannot stays "off"."""

    speculate: str


class Reads(Protocol):
    """What a governor needs of the sensors."""

    def read(self) -> Readings:
        """The readings of this moment."""


@dataclass(frozen=True)
class Status:
    """Result of the last look at the sensors.

    Args:
        avg_bits: the budget, in average bits per weight.
        reason: the cause of the budget, as text for people.
        readings: what the sensors showed.
        tokens_per_s: speed of the last tokens; None when there were none.
        avg_bits_used: average bits per weight that the last tokens used; None when there were none.
        energy_j_per_token: energy since the start, in J per token; None without a power sensor.
        energy_error_j: standard error of it in J; None is unknown.
        saving: what fewer bits would save, as text for people; None while it is unknown.
    """

    avg_bits: float
    reason: str
    readings: Readings
    tokens_per_s: float | None
    avg_bits_used: float | None
    energy_j_per_token: float | None
    energy_error_j: float | None = None
    saving: str | None = None


class Governor:
    """Reads the sensors twice a second and sets ``engine.avg_bits`` by the policy.

    Use it as a context manager.  It sets the first budget when the block begins.  The last budget stays after the
    block; the number of threads is restored, and so is speculation.  A new budget applies from the engine's next token.
    ``policy`` can be replaced at any time.  With any policy except "fixed", ``engine.threads`` follows the processors
    that other programs leave free (see ``Threads``), tokens are guessed under pressure (see ``Engine.speculate``), and
    replies are paced where ``policy.reader_tps`` allows it (see ``RUNGS``).

    It looks at the sensors between two tokens, on the engine's thread.  A look at another time would take a core from
    one of the engine's threads, and the others would wait for it.  When no tokens come, its own thread looks.

    Args:
        engine: the engine to control.
        sensors: gives the readings.
        policy: a row of ``POLICIES``, or a policy of your own.
        on_event: called for each change of the budget and each notice, on the thread that looks.
        clock: returns seconds that never go back.
        learned: what is known about the board from before; None: nothing.
        speculates: whether tokens may be guessed under pressure, where ``engine.speculate`` is "off" now.

    Raises:
        UsageError: the bundle does not have the bounds of the policy.
    """

    def __init__(
        self,
        engine: Governed,
        sensors: Reads,
        policy: Policy,
        on_event: Callable[[Event], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        learned: Learned | None = None,
        speculates: bool = True,
    ) -> None:
        self._engine, self._sensors, self._clock = engine, sensors, clock
        self._on_event = on_event
        self._threaded = engine if isinstance(engine, Threaded) else None
        most = 1 if self._threaded is None else self._threaded.threads
        self._most = most
        off = isinstance(engine, Speculating) and engine.speculate == "off"
        self._speculating = engine if speculates and off and isinstance(engine, Speculating) else None
        self.policy = policy
        self._ladder = Ladder.of(self._policy, Threads.of(most, len(os.sched_getaffinity(0))), learned)
        self._trim = BudgetTrim(self._ladder.bits.bits)
        self._asked = engine.avg_bits
        self._energy = Energy()
        self._tokens: deque[tuple[float, float]] = deque()  # the engine's thread appends, a look empties it
        self._last_token_s = self._drained_s = clock()
        self._status = Status(engine.avg_bits, "not started", Readings(clock()), None, None, None)
        self._paced_s = time.monotonic()  # time of the last look, independent of ``clock``
        self._looking = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mbq-governor", daemon=True)

    @property
    def policy(self) -> Policy:
        """The policy in force, with its bounds.

        Args:
            policy: the new policy.

        Raises:
            UsageError: the bundle does not have the bounds of the policy.
        """
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        threads = None if self._threaded is None else self._most
        speculates = self._speculating is not None
        self._policy = replace(policy.within(self._engine.manifest), threads=threads, speculates=speculates)

    def status(self) -> Status:
        """The result of the last look.  It can be called from any thread."""
        return self._status

    @property
    def learned(self) -> Learned:
        """What is known about the board."""
        return self._ladder.bits.learned

    def observe(self, token_time_s: float, bits_used: float) -> None:
        """Count one decoded token.  Engines with listeners call it by themselves.  It is safe from any thread.

        Args:
            token_time_s: time of the token's pass, in s.
            bits_used: average bits per weight that the token used.
        """
        self._tokens.append((token_time_s, bits_used))

    def tick(self) -> Status:
        """Look once and set the budget.  Inside the ``with`` block the governor calls it; do not call it there."""
        now_s, before = self._clock(), self._ladder
        speed, used, share = self._drain(now_s)
        threads = None if self._threaded is None else self._threaded.threads
        readings = replace(
            self._sensors.read(), tokens_per_s=speed, decode_bits=used, decode_share=share, decode_threads=threads
        )
        look = climb(before, readings, now_s, self._policy)
        self._ladder, state = look.ladder, look.ladder.bits
        budget = state.bits
        self._trim = self._trim.at(budget)
        bundle = self._engine.manifest.budget
        # A fixed budget has no correction, so that a reply can be repeated.
        self._asked = self._trim.request(bundle.min_bits, bundle.max_bits) if self._policy.bands else budget
        if self._asked != self._engine.avg_bits:
            self._engine.avg_bits = self._asked
        done = {"threads": self._set_threads(), "speculation": self._set_speculation()}
        said = (text for text in look.said if done.get(text.partition(":")[0], True))
        for notice in (*state.notices, *said):
            self._tell(Event(time.time(), budget, budget, notice, readings))
        if budget != before.bits.bits:
            self._tell(Event(time.time(), before.bits.bits, budget, look.reason, readings))
        saving = describe_saving(state.learned, self._policy, self._most)
        self._status = Status(
            budget, look.reason, readings, speed, used, self._energy.joules_per_token, self._energy.error_j, saving
        )
        return self._status

    def _set_threads(self) -> bool:
        """Set the number of threads.  Returns whether the engine could; some cannot change it."""
        count = self._ladder.threads.count
        if self._threaded is None:
            return False
        if self._threaded.threads != count:
            self._threaded.threads = count
        return self._threaded.threads == count

    def _set_speculation(self) -> bool:
        """Turn speculation on or off.  Returns whether the engine could; some cannot take guesses back."""
        if self._speculating is None:
            return False
        mode = "auto" if self._ladder.speculates else "off"
        if self._speculating.speculate != mode:
            self._speculating.speculate = mode
        if self._speculating.speculate == mode:
            return True
        self._speculating = None
        self.policy = self._policy
        return False

    def _drain(self, now_s: float) -> tuple[float | None, float | None, float | None]:
        """Count the tokens since the last look.  Returns (tokens/s, average bits used, share of the time)."""
        tokens = [self._tokens.popleft() for _ in range(len(self._tokens))]
        last, elapsed_s = self._status, now_s - self._drained_s
        self._drained_s = now_s
        if not tokens:
            still = last.tokens_per_s and now_s - self._last_token_s < max(_FORGET_S, 3 / last.tokens_per_s)
            return (last.tokens_per_s, last.avg_bits_used, None) if still else (None, None, 0.0)
        self._last_token_s = now_s
        spent_s = sum(seconds for seconds, _ in tokens)
        if abs(self._engine.avg_bits - self._asked) < _SAME_BITS:  # not when a request or a user set the budget
            for _, bits in tokens:
                self._trim = self._trim.after(bits)
        self._energy = self._energy.add(last.readings.power_w, spent_s, len(tokens))
        share = min(spent_s / elapsed_s, 1.0) if elapsed_s > 0 else None
        return len(tokens) / max(spent_s, 1e-9), sum(bits for _, bits in tokens) / len(tokens), share

    def _tell(self, event: Event) -> None:
        if self._on_event is not None:
            self._on_event(event)

    def _between_tokens(self, token_time_s: float, bits_used: float) -> None:
        """The listener that the engine calls on its own thread after each token."""
        self.observe(token_time_s, bits_used)
        if self._ladder.paced and self._policy.reader_tps is not None:
            time.sleep(max(1 / self._policy.reader_tps - token_time_s, 0.0))
        if time.monotonic() - self._paced_s >= PERIOD_S:
            self._look(wait=False)

    def _run(self) -> None:
        while not self._stop.wait(PERIOD_S / 2):
            if time.monotonic() - self._paced_s >= _OVERDUE_S:
                self._look(wait=False)
        self._look(wait=True)  # counts the last tokens

    def _look(self, wait: bool) -> None:
        """Look, unless another look is in progress.  wait: wait for that one and then look again."""
        if not self._looking.acquire(blocking=wait):
            return
        try:
            self._paced_s = time.monotonic()
            self.tick()
        except Exception:  # most likely a fault of a listener; the reply continues at the last budget
            log.exception("the governor could not read the board")
            self._status = replace(self._status, reason="the governor failed; the log has the cause")
        finally:
            self._looking.release()

    def __enter__(self) -> Governor:
        self.tick()
        if isinstance(self._engine, Telling):
            self._engine.add_listener(self._between_tokens)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if self._threaded is not None:
            self._threaded.threads = self._most
        if self._speculating is not None:
            self._speculating.speculate = "off"
        if isinstance(self._engine, Telling):
            self._engine.remove_listener(self._between_tokens)
