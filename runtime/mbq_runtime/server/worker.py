"""The thread of the engine, the queue of requests, and the transfer of a reply to the event loop.

The engine makes one reply at a time.  The text of a reply waits in its job until the client reads it.  A slow client
does not stop the engine, and at most one reply waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby
from typing import TYPE_CHECKING, NamedTuple

from mbq_runtime.control.metered_reply import MeteredReply
from mbq_runtime.engine.generation import FinishReason, GenerationStats
from mbq_runtime.engine.reasoning import is_begun
from mbq_runtime.errors import GrammarError, MbqError, PromptTooLongError

from .errors import ApiError
from .kept_contexts import KeptContexts
from .models import Model, Models
from .requests import MOST_SEEDS, Order

if TYPE_CHECKING:
    from mbq_runtime.engine import Engine, Generation, KeptContext, Likelihood

log = logging.getLogger(__name__)

FAILED = "the engine failed; the log of the server has the reason"


class Part(NamedTuple):
    """Some text of a reply.

    reply: number of the reply, from 0.
    text: the text.
    likelihoods: of the tokens that gave it, where they were asked for.
    """

    reply: int
    text: str
    likelihoods: tuple[Likelihood, ...] = ()


@dataclass(frozen=True)
class Result:
    """Figures of a complete answer, which has one reply or several, to one prompt or several.

    Args:
        finish_reasons: why each reply ended: "stop" or "length".
        stop_texts: the stop text that ended each reply, or None.
        prompt_tokens: number of tokens of all prompts.
        completion_tokens: number of tokens of all replies.
        avg_bits: average bits per weight of its tokens.
        cached_tokens: tokens of the prompts that were kept from an earlier reply.
        reasoning_tokens: tokens of all replies that are reasoning.
        tokens_per_s: decode speed, mean of the replies; None where no reply has a second token.
        ttft_s: time to the first token, in s.
        energy_j: energy in J; None without a power sensor.
    """

    finish_reasons: tuple[str, ...]
    stop_texts: tuple[str | None, ...]
    prompt_tokens: int
    completion_tokens: int
    avg_bits: float
    cached_tokens: int
    reasoning_tokens: int
    tokens_per_s: float | None
    ttft_s: float
    energy_j: float | None


class Job:
    """One reply, on its way from the thread of the worker to the event loop.

    Args:
        model: answers it.
        order: the request.
    """

    def __init__(self, model: Model, order: Order) -> None:
        self.model, self.order = model, order
        self.cancelled = False
        self.reply: Generation | None = None
        self.prompt: list[int] = []
        self.session: KeptContext | None = None
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._waiting: deque[Part] = deque()
        self._begun = False
        self._end: Result | ApiError | None = None

    async def started(self) -> None:
        """Wait until the engine has accepted the prompt.

        Raises:
            ApiError: the engine refused it, or the request was cancelled.
        """
        while not self._begun and self._end is None:
            await self._changed.wait()
            self._changed.clear()
        if isinstance(self._end, ApiError) and not self._begun:
            raise self._end

    async def parts(self) -> AsyncIterator[Part]:
        """The text of the replies.  Each part is all the text of one reply that is ready.

        Raises:
            ApiError: the engine failed.
        """
        while True:
            end = self._end  # read before the text: no text follows the end
            ready = [self._waiting.popleft() for _ in range(len(self._waiting))]
            for reply, parts in groupby(ready, key=lambda part: part.reply):
                _, texts, likelihoods = zip(*parts, strict=True)
                yield Part(reply, "".join(texts), tuple(chain.from_iterable(likelihoods)))
            if ready:
                continue
            if isinstance(end, ApiError):
                raise end
            if end is not None:
                return
            await self._changed.wait()
            self._changed.clear()

    @property
    def result(self) -> Result:
        """The figures of the reply; only after the last piece."""
        assert isinstance(self._end, Result)
        return self._end

    # The worker calls these on its thread.

    def begin(self) -> None:
        """The engine has accepted the prompt."""
        self._begun = True
        self._notify()

    def put(self, part: Part) -> None:
        """Add a part of a reply.

        Args:
            part: the part.
        """
        self._waiting.append(part)
        self._notify()

    def end(self, how: Result | ApiError) -> None:
        """End the reply.

        Args:
            how: its figures, or the error.
        """
        self._end = how
        self._notify()

    def _notify(self) -> None:
        self._loop.call_soon_threadsafe(self._changed.set)


class Worker:
    """Runs requests one after another on a thread of its own.  It is a context manager.

    ``on_result`` is called on this thread after each reply, also after an abandoned one.  ``prompt_tokens``,
    ``cached_tokens`` and ``tokens`` count the tokens of prompts, those of them that were not read, and the tokens of
    replies so far; ``guessed`` and ``kept_guesses`` the tokens that were guessed, and those of them that were right.

    Args:
        models: the models, each with its engine.
        limit: number of requests that can wait while one runs.
        cache_bytes: bytes of the contexts that are kept after their reply; 0: none.
        sleep_s: seconds without a request after which the model's memory is freed; None: never.
    """

    def __init__(
        self,
        models: Models,
        *,
        limit: int,
        cache_bytes: int = 0,
        sleep_s: float | None = None,
    ) -> None:
        self._models, self._sleep_s = models, sleep_s
        self.limit = limit
        self.on_result: Callable[[Result], None] = lambda result: None
        self.contexts = KeptContexts(cache_bytes)
        models.before_sleep = self.contexts.drop
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.tokens = 0
        self.guessed = 0
        self.kept_guesses = 0
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._closing = False
        self._changed = threading.Condition(threading.RLock())
        self._thread = threading.Thread(target=self._run, name="mbq-engine", daemon=True)

    def __enter__(self) -> Worker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._thread.join()

    @property
    def waiting(self) -> int:
        """Number of requests that wait."""
        return len(self._waiting)

    @property
    def asleep(self) -> bool:
        """Whether no model is in memory."""
        return not self._models.in_memory

    @property
    def running(self) -> bool:
        """Whether a reply is in progress."""
        return self._running is not None

    def submit(self, model: Model, order: Order) -> Job:
        """Put a request into the queue.  Call it from an event loop.

        Args:
            model: answers it.
            order: the request.

        Raises:
            ApiError: the queue is full (status 429).
        """
        with self._changed:
            if self._closing:
                raise _stopping()
            if len(self._waiting) >= self.limit + (self._running is None):
                raise ApiError(
                    429,
                    f"{self.limit} requests are already waiting; try again later",
                    code="queue_full",
                    headers={"Retry-After": "1"},
                )
            job = Job(model, order)
            self._waiting.append(job)
            self._changed.notify()
            return job

    def cancel(self, job: Job) -> None:
        """Remove a job from the queue, or stop it after its current pass.

        Args:
            job: a job that no client waits for.
        """
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
            if job.reply is not None:
                job.reply.stop()

    def close(self) -> None:
        """End every request: those that wait at once, the running one before its next token.  From any thread."""
        with self._changed:
            self._closing = True
            while self._waiting:
                self._waiting.popleft().end(_stopping())
            if self._running is not None:
                self.cancel(self._running)
            self._changed.notify()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                job.end(self._answer(job))
            except ApiError as error:
                job.end(error)
            except GrammarError as error:
                job.end(ApiError(400, str(error), param=job.order.grammar_field, code="invalid_grammar"))
            except Exception:
                # An error of one request must not stop the next one.
                log.exception("a reply failed")
                job.end(ApiError(500, FAILED, code="engine_failed"))
            job.session = job.reply = None  # the model's memory cannot be freed while a job has them
            self.contexts.trim()

    def _next(self) -> Job | None:
        while True:
            with self._changed:
                self._running = None
                patience_s = None if self.asleep else self._sleep_s
                awake = self._changed.wait_for(lambda: self._waiting or self._closing, patience_s)
                if self._closing:
                    return None
                if awake:
                    self._running = self._waiting.popleft()
                    return self._running
            try:
                self._models.sleep()
            except Exception:
                # Other code of the program may use the engine.  The models are put to sleep after the next pause.
                log.exception("the models stay in memory")

    def _answer(self, job: Job) -> Result:
        order, done = job.order, []
        energy_j: float | None = 0.0
        self._models.use(job.model)
        with self._models.bounded.within_bounds(order.floor_bits, order.ceiling_bits):
            prompts = self._prompts(job)
            for index in range(len(prompts) * order.replies):
                if index % order.replies == 0:  # the other replies to a prompt find it read
                    self._open(job, prompts[index // order.replies])
                stats, spent_j = self._reply(job, index) if order.options["max_tokens"] else self._no_reply(job, index)
                done.append(stats)
                energy_j = None if energy_j is None or spent_j is None else energy_j + spent_j
                if stats.finish_reason == "closed":
                    break
        result = _result(done, energy_j, order.replies)
        self.prompt_tokens += result.prompt_tokens
        self.cached_tokens += result.cached_tokens
        self.on_result(result)
        if self._closing and done[-1].finish_reason == "closed":
            raise _stopping()
        return result

    def _prompts(self, job: Job) -> list[list[int]]:
        """The ids of all prompts.  One that is refused refuses the request, before any reply."""
        engine, found = job.model.engine, []
        for at, prompt in enumerate(job.order.prompts):
            with _refusals(engine, f"prompt {at}: " if len(job.order.prompts) > 1 else ""):
                found.append(engine.prompt_tokens(prompt, **job.order.rendering))
        return found

    def _open(self, job: Job, prompt: list[int]) -> None:
        """Begin with a prompt.  Its replies share a context."""
        engine, order = job.model.engine, job.order
        job.prompt = prompt
        if not order.options["max_tokens"]:
            return
        job.session = self.contexts.take(engine, prompt)
        if job.session is None and order.replies > 1:
            job.session = engine.session()

    def _no_reply(self, job: Job, index: int) -> tuple[GenerationStats, float | None]:
        """The prompt alone, with its likelihoods where they were asked for."""
        job.begin()
        job.put(self._echo(job, index))
        reason: FinishReason = "closed" if job.cancelled else "length"
        return GenerationStats(len(job.prompt), (), (), 0.0, 0, 0.0, None, reason), None

    def _reply(self, job: Job, index: int) -> tuple[GenerationStats, float | None]:
        """Make one reply.  index: its number among the replies to all prompts.  Returns its figures and energy in J."""
        order, engine, seed, prompt = job.order, job.model.engine, job.order.options["seed"], job.prompt
        if seed is not None:
            seed = (seed + index % order.replies) % MOST_SEEDS
        with _refusals(engine):
            reply = engine.generate(prompt, session=job.session, **{**order.options, "seed": seed})
        with self._changed:
            job.reply = reply
            if job.cancelled:
                reply.stop()
        job.begin()
        if order.echo:
            job.put(self._echo(job, index))
        marks = engine.reasoning_marks if order.rendering.get("chat") else None
        if marks is not None and is_begun(prompt, engine.spell, marks):
            job.put(Part(index, marks.opens))  # the prompt has it, and those who divide the reply need it
        metered, told = MeteredReply(reply, self._models.governor), 0
        with reply:
            for piece in metered:
                likelihoods = reply.stats.likelihoods[told:]
                told += len(likelihoods)
                job.put(Part(index, piece.text, likelihoods))
                self.tokens += piece.tokens
        stats = reply.stats
        self.guessed += stats.guessed
        self.kept_guesses += stats.kept_guesses
        if told < len(stats.likelihoods):  # tokens after the last text
            job.put(Part(index, "", stats.likelihoods[told:]))
        return stats, metered.energy_j

    def _echo(self, job: Job, index: int) -> Part:
        """The prompt as a part of a reply."""
        count, engine = job.order.options["logprobs"], job.model.engine
        likelihoods = [] if count is None else engine.likelihoods(job.prompt, engine.avg_bits, count)
        given = job.order.prompts[index // job.order.replies]
        return Part(index, given if isinstance(given, str) else engine.decode(job.prompt), tuple(likelihoods))


@contextmanager
def _refusals(engine: Engine, where: str = "") -> Iterator[None]:
    """What an engine refuses, as the error of a request.  where: the start of its message."""
    try:
        yield
    except PromptTooLongError as error:
        raise ApiError(400, f"{where}{error}", code="context_length_exceeded") from None
    except GrammarError:
        raise
    except MbqError as error:  # from the tokenizer or the template
        message = str(error).removeprefix(f"{engine.path}: ")
        raise ApiError(400, where + message, code="invalid_prompt") from None


def _result(replies: Sequence[GenerationStats], energy_j: float | None, each: int) -> Result:
    """The figures of all replies.  each: replies to one prompt."""
    firsts, bits = replies[::each], [bits for stats in replies for bits in stats.bits]
    speeds = [stats.tokens_per_s for stats in replies if stats.tokens_per_s is not None]
    return Result(
        tuple(stats.finish_reason or "length" for stats in replies),
        tuple(stats.stop_text for stats in replies),
        sum(stats.prompt_tokens for stats in firsts),
        sum(len(stats.tokens) for stats in replies),
        math.fsum(bits) / len(bits) if bits else 0.0,
        sum(stats.cached_tokens for stats in firsts),
        sum(stats.reasoning_tokens for stats in replies),
        math.fsum(speeds) / len(speeds) if speeds else None,
        firsts[0].ttft_s,
        energy_j,
    )


def _stopping() -> ApiError:
    return ApiError(503, "the server stops; send the request again later", code="server_stopping")
