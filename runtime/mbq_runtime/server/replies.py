"""Replies on their way to clients: one JSON object, or server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any, Protocol

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from .errors import ApiError
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


class Shape(Protocol):
    """The format of one answer of one endpoint."""

    def events(self, job: Job) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events, errors included.

        Args:
            job: whose parts are read.
        """

    def document(self, parts: Sequence[Part], result: Result) -> dict[str, Any]:
        """The answer as one JSON object.

        Args:
            parts: all of them.
            result: the figures.
        """


def joined(reply: int, parts: Sequence[Part]) -> Part:
    """All parts of one reply.

    Args:
        reply: its number.
        parts: of all replies.
    """
    own = [part for part in parts if part.reply == reply]
    return Part(reply, "".join(part.text for part in own), tuple(one for part in own for one in part.likelihoods))


def event(payload: Any, name: str | None = None) -> bytes:
    """One server-sent event.

    Args:
        payload: its data, as values for JSON.
        name: of the event; None: it has none.
    """
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(payload, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class Reply:
    """The ASGI response of one job.

    Args:
        job: the job.
        shape: the format of the endpoint.
        done: called with the job when the client has its reply or is gone.
        stream: whether the reply is sent as server-sent events.
    """

    def __init__(self, job: Job, shape: Shape, done: Callable[[Job], None], *, stream: bool) -> None:
        self._job, self._shape, self._done, self._stream = job, shape, done, stream

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
                await send_events(send, _with_comments(self._shape.events(self._job)))
                return
            await self._job.started()
            parts = [part async for part in self._job.parts()]
            response = JSONResponse(self._shape.document(parts, self._job.result))
        except ApiError as error:
            response = error.response()
        await response(scope, receive, send)


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
