"""The engine's own thread, the queue before it, and the way a reply travels back to the event loop.

The engine gives one reply at a time.  A reply's text waits in its job for the client to take it, so a
slow client neither stops the engine nor grows anything: what waits is never more than one reply.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mbq_runtime.control.metered_reply import MeteredReply
from mbq_runtime.errors import MbqError

from .errors import ApiError
from .requests import Order

if TYPE_CHECKING:
    from mbq_runtime.control.bounds import BoundedEngine
    from mbq_runtime.control.governor import Governor
    from mbq_runtime.engine import Engine, Generation

log = logging.getLogger(__name__)

FAILED = "the engine failed; the server's log says why"


@dataclass(frozen=True)
class Result:
    """Figures of a whole reply.  energy_j: None when no sensor measures power."""

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    avg_bits: float
    tokens_per_s: float
    ttft_s: float
    energy_j: float | None


class Job:
    """One reply, between the worker's thread and the event loop that made it."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.cancelled = False
        self.reply: Generation | None = None
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._waiting: deque[str] = deque()
        self._begun = False
        self._end: Result | ApiError | None = None

    async def started(self) -> None:
        """Wait until the engine has taken the prompt.  Raises ApiError when it does not."""
        while not self._begun and self._end is None:
            await self._changed.wait()
            self._changed.clear()
        if isinstance(self._end, ApiError) and not self._begun:
            raise self._end

    async def pieces(self) -> AsyncIterator[str]:
        """The reply's text, as much at a time as has come.  Raises ApiError when the engine fails."""
        while True:
            end = self._end  # before the text: what comes after the end is nothing
            text = "".join(self._waiting.popleft() for _ in range(len(self._waiting)))
            if text:
                yield text
            elif isinstance(end, ApiError):
                raise end
            elif end is not None:
                return
            else:
                await self._changed.wait()
                self._changed.clear()

    @property
    def result(self) -> Result:
        """Of a reply whose pieces came to their end."""
        assert isinstance(self._end, Result)
        return self._end

    # The worker's side, on its thread.

    def begin(self) -> None:
        self._begun = True
        self._notify()

    def put(self, text: str) -> None:
        self._waiting.append(text)
        self._notify()

    def end(self, how: Result | ApiError) -> None:
        self._end = how
        self._notify()

    def _notify(self) -> None:
        self._loop.call_soon_threadsafe(self._changed.set)


class Worker:
    """Context manager: runs the thread.

    limit: how many requests may wait beside the one that runs; on_result: called on the worker's
    thread after each reply, also one that was left; prompt_tokens, tokens: read and made so far.
    """

    def __init__(self, engine: Engine, bounded: BoundedEngine, governor: Governor, limit: int) -> None:
        self._engine, self._bounded, self._governor = engine, bounded, governor
        self.limit = limit
        self.on_result: Callable[[Result], None] = lambda result: None
        self.prompt_tokens = 0
        self.tokens = 0
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="mbq-engine", daemon=True)

    def __enter__(self) -> Worker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closing = True
            running = self._running
            self._changed.notify()
        if running is not None:
            self.cancel(running)
        self._thread.join()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> bool:
        return self._running is not None

    def submit(self, order: Order) -> Job:
        """Queue a request; from an event loop.  Raises ApiError (429) when the queue is full."""
        with self._changed:
            if len(self._waiting) >= self.limit + (self._running is None):
                raise ApiError(
                    429,
                    f"{self.limit} requests are waiting already; try again later",
                    code="queue_full",
                    headers={"Retry-After": "1"},
                )
            job = Job(order)
            self._waiting.append(job)
            self._changed.notify()
            return job

    def cancel(self, job: Job) -> None:
        """Nobody waits for it any more: it leaves the queue, or stops after its present pass."""
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
            if job.reply is not None:
                job.reply.stop()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                job.end(self._answer(job))
            except ApiError as error:
                job.end(error)
            except Exception:
                # Whatever it is, the next request deserves its answer.
                log.exception("a reply failed")
                job.end(ApiError(500, FAILED, code="engine_failed"))

    def _next(self) -> Job | None:
        with self._changed:
            self._running = None
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if self._closing:
                return None
            self._running = self._waiting.popleft()
            return self._running

    def _answer(self, job: Job) -> Result:
        order = job.order
        with self._bounded.within_bounds(order.floor_bits, order.ceiling_bits):
            try:
                reply = self._engine.generate(order.prompt, **order.options)
            except MbqError as error:  # the tokenizer's, the template's, or a length
                message = str(error).removeprefix(f"{self._engine.path}: ")
                raise ApiError(400, message, code="invalid_prompt") from None
            with self._changed:
                job.reply = reply
                if job.cancelled:
                    reply.stop()
            job.begin()
            metered = MeteredReply(reply, self._governor)
            with reply:
                for piece in metered:
                    job.put(piece.text)
                    self.tokens += piece.tokens
        stats = reply.stats
        self.prompt_tokens += stats.prompt_tokens
        result = Result(
            stats.finish_reason or "length",
            stats.prompt_tokens,
            len(stats.tokens),
            stats.avg_bits_used,
            stats.tokens_per_s,
            stats.ttft_s,
            metered.energy_j,
        )
        self.on_result(result)
        return result
