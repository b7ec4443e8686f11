"""Replies in the format of OpenAI's API: one JSON object, or server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any, ClassVar
from uuid import uuid4

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from .errors import ApiError
from .tools import Call, CallReader, ToolFormat
from .worker import Job, Part, Result

EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # without it nginx holds the tokens until the reply is complete
]
_PROMPT_S = 0.5  # a refusal within this time has its own status; after it, the headers of a stream are sent
_COMMENT_S = 3.0  # longest silence of a stream
_COMMENT = b": the reply is on its way\n\n"
_STALL_S = 30.0  # a client that reads nothing for this long is gone


class Shape:
    """The format of one reply of one endpoint.

    Args:
        model: name of the model.
        spell: returns the bytes of a token, by its id.
    """

    PREFIX: ClassVar[str]
    OBJECT: ClassVar[str]
    CHUNK: ClassVar[str]

    def __init__(self, model: str, spell: Callable[[int], bytes]) -> None:
        self._spell = spell
        self._same = {"id": f"{self.PREFIX}-{uuid4().hex}", "created": int(time.time()), "model": model}

    def first(self) -> dict[str, Any] | None:
        """The choice of the first chunk of a stream; None: no such chunk."""
        return None

    def part(self, part: Part, *, last: bool = False) -> dict[str, Any]:
        """The choice of a chunk.

        Args:
            part: what the chunk has.
            last: whether the reply ends with it.
        """
        raise NotImplementedError

    def whole(self, part: Part) -> dict[str, Any]:
        """The choice of a reply that is not streamed.

        Args:
            part: all of the reply.
        """
        raise NotImplementedError

    def reason(self, reply: int, reason: str) -> str:
        """Why a reply ended, in the words of the API; after its last part.

        Args:
            reply: its number.
            reason: why the engine ended it.
        """
        return reason

    def likelihoods(self, part: Part) -> dict[str, Any] | None:
        """The field ``logprobs`` of a choice; None where nobody asked.

        Args:
            part: what the choice has.
        """
        raise NotImplementedError

    def envelope(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The JSON object around choices.

        Args:
            kind: value of its field ``object``.
            choices: the choices; missing fields get their default.
            more: additional fields.
        """
        filled = [{"index": 0, "logprobs": None, "finish_reason": None, **choice} for choice in choices]
        return {**self._same, "object": kind, "choices": filled, **more}


class ChatShape(Shape):
    """The format of /v1/chat/completions."""

    PREFIX, OBJECT, CHUNK = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, spell: Callable[[int], bytes], tool_format: ToolFormat | None = None) -> None:
        """See ``Shape``.

        Args:
            model: see ``Shape``.
            spell: see ``Shape``.
            tool_format: how the model writes calls of tools; None: a reply has none.
        """
        super().__init__(model, spell)
        self._tool_format = tool_format
        self._readers: dict[int, CallReader] = {}

    def first(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}

    def part(self, part: Part, *, last: bool = False) -> dict[str, Any]:
        before = self._calls(part.reply)
        text, calls = self._divided(part, last)
        delta: dict[str, Any] = {"content": text} if text else {}
        if calls:
            delta["tool_calls"] = [call.as_json(before + at) for at, call in enumerate(calls)]
        return {"delta": delta}

    def whole(self, part: Part) -> dict[str, Any]:
        text, calls = self._divided(part, last=True)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            message |= {"content": text or None, "tool_calls": [call.as_json() for call in calls]}
        return {"message": message}

    def reason(self, reply: int, reason: str) -> str:
        return "tool_calls" if self._calls(reply) and reason == "stop" else reason

    def _calls(self, reply: int) -> int:
        """Calls of a reply so far."""
        return self._readers[reply].calls if reply in self._readers else 0

    def _divided(self, part: Part, last: bool) -> tuple[str, list[Call]]:
        """Text and calls that are complete."""
        if self._tool_format is None:
            return part.text, []
        reader = self._readers.setdefault(part.reply, CallReader(self._tool_format))
        found = [*reader.feed(part.text), *(reader.finish() if last else ())]
        texts = [one for one in found if isinstance(one, str)]
        return "".join(texts), [one for one in found if isinstance(one, Call)]

    def likelihoods(self, part: Part) -> dict[str, Any] | None:
        if not part.likelihoods:
            return None

        def entry(token: int, logprob: float) -> dict[str, Any]:
            spelled = self._spell(token)
            return {"token": spelled.decode(errors="replace"), "logprob": logprob, "bytes": list(spelled)}

        content = [
            {**entry(one.token, one.logprob), "top_logprobs": [entry(*likely) for likely in one.top]}
            for one in part.likelihoods
        ]
        return {"content": content, "refusal": None}


class CompletionShape(Shape):
    """The format of /v1/completions."""

    PREFIX, OBJECT, CHUNK = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, spell: Callable[[int], bytes]) -> None:
        """See ``Shape``.

        Args:
            model: see ``Shape``.
            spell: see ``Shape``.
        """
        super().__init__(model, spell)
        self._offsets: dict[int, int] = {}  # characters of each reply whose tokens were reported

    def part(self, part: Part, *, last: bool = False) -> dict[str, Any]:
        return {"text": part.text}

    whole = part

    def likelihoods(self, part: Part) -> dict[str, Any] | None:
        if not part.likelihoods:
            return None
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for one in part.likelihoods:
            text = self._spell(one.token).decode(errors="replace")
            found["tokens"].append(text)
            found["token_logprobs"].append(one.logprob)
            # Bytes that are no character look the same: the likeliest of them stays.
            likely = ((self._spell(token).decode(errors="replace"), value) for token, value in reversed(one.top))
            found["top_logprobs"].append(dict(likely))
            found["text_offset"].append(self._offsets.setdefault(part.reply, 0))
            self._offsets[part.reply] += len(text)
        return found


def usage(result: Result) -> dict[str, Any]:
    """OpenAI's counts, average bits per weight, speed, and energy in J (null without a power sensor).

    Args:
        result: figures of the reply.
    """
    return {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.completion_tokens,
        "total_tokens": result.prompt_tokens + result.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": result.cached_tokens},
        "avg_bits": round(result.avg_bits, 3),
        "energy_j": None if result.energy_j is None else round(result.energy_j, 3),
        "tokens_per_s": round(result.tokens_per_s, 2),
        "ttft_s": round(result.ttft_s, 4),
    }


def event(payload: Any) -> bytes:
    """One server-sent event.

    Args:
        payload: its data, as values for JSON.
    """
    return f"data: {json.dumps(payload, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class Reply:
    """The ASGI response of one job.

    Args:
        job: the job.
        shape: the format of the endpoint.
        done: called with the job when the client has its reply or is gone.
        stream: whether the reply is sent as server-sent events.
        with_usage: whether a stream ends with a chunk of the counts.
    """

    def __init__(self, job: Job, shape: Shape, done: Callable[[Job], None], *, stream: bool, with_usage: bool) -> None:
        self._job, self._shape, self._done = job, shape, done
        self._stream, self._with_usage = stream, with_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the reply.

        Args:
            scope: the request, as in ASGI.
            receive: gives the messages of the client.
            send: sends messages to the client.
        """
        try:
            await while_connected(receive, self._answer(scope, receive, send))
        finally:
            self._done(self._job)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if self._stream:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_PROMPT_S):
                        await self._job.started()
                await send_events(send, _with_comments(self._events()))
                return
            await self._job.started()
            parts = [part async for part in self._job.parts()]
            choices = []
            for reply, reason in enumerate(self._job.result.finish_reasons):
                part = _joined(reply, parts)
                choice = self._shape.whole(part) | {"finish_reason": self._shape.reason(reply, reason)}
                choices.append(choice | self._about(part))
            envelope = self._shape.envelope(self._shape.OBJECT, choices, usage=usage(self._job.result))
            response = JSONResponse(envelope)
        except ApiError as error:
            response = error.response()
        await response(scope, receive, send)

    async def _events(self) -> AsyncGenerator[bytes, None]:
        shape, begun = self._shape, set[int]()
        for choice in self._opening(0, begun):
            yield event(shape.envelope(shape.CHUNK, [choice]))
        try:
            async for part in self._job.parts():
                for choice in self._opening(part.reply, begun):
                    yield event(shape.envelope(shape.CHUNK, [choice]))
                choice = shape.part(part)
                if part.likelihoods or any(choice.get("delta", choice).values()):  # not what is held back
                    yield event(shape.envelope(shape.CHUNK, [choice | self._about(part)]))
        except ApiError as error:  # the status was already sent
            yield event(error.body())
            return
        result = self._job.result
        for reply, reason in enumerate(result.finish_reasons):
            for choice in self._opening(reply, begun):
                yield event(shape.envelope(shape.CHUNK, [choice]))
            rest = shape.part(Part(reply, ""), last=True)
            if rest.get("delta"):
                yield event(shape.envelope(shape.CHUNK, [{**rest, "index": reply}]))
                rest = {"delta": {}}
            end = {"index": reply, "finish_reason": shape.reason(reply, reason)}
            yield event(shape.envelope(shape.CHUNK, [rest | end]))
        if self._with_usage:
            yield event(shape.envelope(shape.CHUNK, [], usage=usage(result)))
        yield b"data: [DONE]\n\n"

    def _opening(self, reply: int, begun: set[int]) -> list[dict[str, Any]]:
        """The choice before the first text of a reply; nothing for a reply that has begun."""
        first = self._shape.first()
        if first is None or reply in begun:
            return []
        begun.add(reply)
        return [{**first, "index": reply}]

    def _about(self, part: Part) -> dict[str, Any]:
        return {"index": part.reply, "logprobs": self._shape.likelihoods(part)}


def _joined(reply: int, parts: Sequence[Part]) -> Part:
    """All parts of one reply."""
    own = [part for part in parts if part.reply == reply]
    return Part(reply, "".join(part.text for part in own), tuple(one for part in own for one in part.likelihoods))


async def _with_comments(events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The events, and a comment whenever there was none for a time, so that clients and proxies keep waiting."""
    async with aclosing(events):
        while True:
            coming = asyncio.ensure_future(anext(events, None))
            try:
                while not (await asyncio.wait({coming}, timeout=_COMMENT_S))[0]:
                    yield _COMMENT
                found = await coming
            finally:
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)
            if found is None:
                return
            yield found


async def send_events(send: Send, events: AsyncGenerator[bytes, None]) -> None:
    """Send a stream of events.  It stops, without the end of the response, when the client reads nothing for 30 s.

    Args:
        send: sends messages to the client.
        events: the events as bytes.
    """
    try:
        await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
        async with aclosing(events):
            async for data in events:
                async with asyncio.timeout(_STALL_S):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
    except TimeoutError:
        return


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run a task until it ends or the client disconnects.  The request body must be read before.

    Args:
        receive: gives the messages of the client.
        work: the task.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
    if not working.cancelled():
        working.result()  # raises the error of the task


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
