"""Ties sensors, the controller's step and an engine together while a reply is made."""

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
from .controller import start, step
from .energy import Energy
from .events import Event
from .policy import Policy
from .threads import Threads

log = logging.getLogger(__name__)

PERIOD_S = 0.5
_OVERDUE_S = 1.5 * PERIOD_S  # without a token for so long the governor's own thread looks
_SAME_BITS = 1e-3  # engines keep the budget in single precision
_FORGET_S = 3.0  # a speed older than this, and than a few tokens, is no longer the present one


class Governed(Protocol):
    """What a governor needs of an engine: a budget that may be set from any thread, and the bundle's manifest."""

    avg_bits: float

    @property
    def manifest(self) -> Manifest: ...


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
    """An engine whose processor threads may be fewer than it was loaded with, from any thread."""

    threads: int


class Reads(Protocol):
    """What a governor needs of the sensors."""

    def read(self) -> Readings: ...


@dataclass(frozen=True)
class Status:
    """The latest look.

    avg_bits: the budget; tokens_per_s, avg_bits_used: of the tokens of late, None when there were
    none; energy_j_per_token: since the start, None without a power sensor.
    """

    avg_bits: float
    reason: str
    readings: Readings
    tokens_per_s: float | None
    avg_bits_used: float | None
    energy_j_per_token: float | None


class Governor:
    """Sets ``engine.avg_bits`` to what the policy makes of the sensors, twice a second.

    It looks between two tokens, on the engine's thread: a look beside it would take a core from a thread that the
    others wait for, and half of their speed for as long.  Where no tokens come its own thread looks.

    With any policy but "fixed", ``engine.threads`` follow the processors that other programs leave, see ``Threads``.
    A context manager: the first budget is set on entering, and the last one stays after leaving; the threads
    are as they were.
    A new budget takes effect at the engine's next token.  ``policy`` may be replaced at any time.
    on_event: called for every change and every word about the sensors, in whichever thread looks.
    Raises UsageError for a policy the bundle cannot hold.
    """

    def __init__(
        self,
        engine: Governed,
        sensors: Reads,
        policy: Policy,
        on_event: Callable[[Event], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._sensors, self._clock = engine, sensors, clock
        self._on_event = on_event
        self._threaded = engine if isinstance(engine, Threaded) else None
        most = 1 if self._threaded is None else self._threaded.threads
        self._threads = Threads.of(most, len(os.sched_getaffinity(0)))
        self.policy = policy
        self._state = start(self._policy)
        self._trim = BudgetTrim(self._state.bits)
        self._asked = engine.avg_bits
        self._energy = Energy()
        self._tokens: deque[tuple[float, float]] = deque()  # appended by the engine's thread, drained by a look
        self._last_token_s = clock()
        self._status = Status(engine.avg_bits, "not started", Readings(clock()), None, None, None)
        self._paced_s = time.monotonic()  # the last look, whatever ``clock`` shows
        self._looking = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mbq-governor", daemon=True)

    @property
    def policy(self) -> Policy:
        """The one in force, with its bounds."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        threads = None if self._threaded is None else self._threads.most
        self._policy = replace(policy.within(self._engine.manifest), threads=threads)

    def status(self) -> Status:
        """From any thread."""
        return self._status

    def observe(self, token_time_s: float, bits_used: float) -> None:
        """One token was decoded.  From any thread; an engine that tells its tokens is listened to without this."""
        self._tokens.append((token_time_s, bits_used))

    def tick(self) -> Status:
        """Look once and set the budget: what is done by itself after entering, and by nobody else then."""
        now_s, before = self._clock(), self._state
        speed, used = self._drain(now_s)
        readings = replace(self._sensors.read(), tokens_per_s=speed)
        self._state, budget, reason = step(self._state, readings, now_s, self._policy)
        self._trim = self._trim.at(budget)
        bundle = self._engine.manifest.budget
        # A fixed budget is the router's own, so that a reply can be repeated.
        self._asked = self._trim.request(bundle.min_bits, bundle.max_bits) if self._policy.bands else budget
        if self._asked != self._engine.avg_bits:
            self._engine.avg_bits = self._asked
        for notice in self._state.notices:
            self._tell(Event(time.time(), budget, budget, notice, readings))
        if budget != before.bits:
            self._tell(Event(time.time(), before.bits, budget, reason, readings))
        # The controller's clock is the one that no jump upsets.
        self._follow_load(readings, self._state.clock_s - before.clock_s)
        self._status = Status(budget, reason, readings, speed, used, self._energy.joules_per_token)
        return self._status

    def _follow_load(self, readings: Readings, elapsed_s: float) -> None:
        """Give the engine as many threads as there is room for."""
        if self._threaded is None:
            return
        before = self._threads
        follows = bool(self._policy.bands)
        self._threads = before.after(readings, elapsed_s) if follows else Threads.of(before.most, before.cpus)
        if self._threads.count == before.count:
            return
        self._threaded.threads = self._threads.count
        if self._threaded.threads == self._threads.count:  # else an engine that cannot change it
            bits = self._state.bits
            self._tell(Event(time.time(), bits, bits, self._threads.describe(before.count), readings))

    def _drain(self, now_s: float) -> tuple[float | None, float | None]:
        """Book the tokens since the last look: (tokens/s, bits used)."""
        tokens = [self._tokens.popleft() for _ in range(len(self._tokens))]
        last = self._status
        if not tokens:
            still = last.tokens_per_s and now_s - self._last_token_s < max(_FORGET_S, 3 / last.tokens_per_s)
            return (last.tokens_per_s, last.avg_bits_used) if still else (None, None)
        self._last_token_s = now_s
        spent_s = sum(seconds for seconds, _ in tokens)
        if abs(self._engine.avg_bits - self._asked) < _SAME_BITS:  # else a request or a person set the budget
            for _, bits in tokens:
                self._trim = self._trim.after(bits)
        self._energy = self._energy.add(last.readings.power_w, spent_s, len(tokens))
        return len(tokens) / max(spent_s, 1e-9), sum(bits for _, bits in tokens) / len(tokens)

    def _tell(self, event: Event) -> None:
        if self._on_event is not None:
            self._on_event(event)

    def _between_tokens(self, token_time_s: float, bits_used: float) -> None:
        """What the engine tells its tokens to, on its own thread."""
        self.observe(token_time_s, bits_used)
        if time.monotonic() - self._paced_s >= PERIOD_S:
            self._look(wait=False)

    def _run(self) -> None:
        while not self._stop.wait(PERIOD_S / 2):
            if time.monotonic() - self._paced_s >= _OVERDUE_S:
                self._look(wait=False)
        self._look(wait=True)  # books the last tokens

    def _look(self, wait: bool) -> None:
        """wait: for a look that is under way; else that one will do."""
        if not self._looking.acquire(blocking=wait):
            return
        try:
            self._paced_s = time.monotonic()
            self.tick()
        except Exception as error:  # a listener's mistake, most likely: the reply goes on at the last budget
            log.exception("the governor could not look at the board")
            self._status = replace(self._status, reason=f"the governor failed: {error}")
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
            self._threaded.threads = self._threads.most
        if isinstance(self._engine, Telling):
            self._engine.remove_listener(self._between_tokens)
