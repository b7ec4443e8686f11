"""Bounds on what connections may hold: time for headers, number of connections, size of parts, bytes of bodies.

uvicorn bounds the size of headers, and the time between two requests.  It has no setting for the rest.
"""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_S = 10.0
"""Most time from a connection, or from the first byte of a later request, to the end of its headers."""

_MOST_CONNECTIONS = 256
_BACKLOG = 512
_ACCEPTED_AT_ONCE = 16
_READ_BYTES = 16 << 10

SMALL_BYTES = 32 << 10
LARGE_AT_ONCE = 8
"""Bodies above SMALL_BYTES that are read at a time."""

_FREE_PARTS = 256
_PART_BYTES = 64
"""A body may come in _FREE_PARTS parts, and in one more for each _PART_BYTES.  A part has a cost whatever its size."""


def most_connections() -> int:
    """How many connections are kept: at most a quarter of the files that this process may open."""
    return max(8, min(_MOST_CONNECTIONS, _most_files() // 4))


def accepted_at_once() -> int:
    """How many connections one turn of the event loop accepts.

    New connections come between two turns of those that are there.  A small part of all places: a connection is not
    the one that has waited longest before it was read.
    """
    return max(1, min(_ACCEPTED_AT_ONCE, most_connections() // 4))


class Listener(socket.socket):
    """A listening socket with a long queue.  The event loop takes one number for the queue and for what it accepts."""

    def listen(self, backlog: int = _BACKLOG, /) -> None:
        """Listen.

        Args:
            backlog: not used.
        """
        super().listen(_BACKLOG)


def _most_files() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft > 0 else 1 << 20


class _Parser(h11.Connection):
    """h11's parser, which refuses bodies in tiny parts."""

    def __init__(self, max_incomplete_event_size: int) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size)
        self._parts = self._bytes = 0

    def next_event(self) -> Any:
        """The next event, as in h11."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._parts = self._bytes = 0
        elif isinstance(event, h11.Data):
            self._parts += 1
            self._bytes += len(event.data)
            if self._parts > _FREE_PARTS + self._bytes // _PART_BYTES:
                raise h11.RemoteProtocolError("the body comes in too small parts")
        return event


class BoundedProtocol(H11Protocol):
    """uvicorn's connection, with a deadline for headers and a bound on the number of connections.

    Above the bound, the connection that has waited longest without a whole request is closed.

    A connection is read no further while the application does not take what came of the body.

    Args:
        config: settings of uvicorn.
        server_state: what the connections of a server share.
        app_state: state of the application.
        _loop: the event loop.
    """

    _orders: ClassVar[WeakKeyDictionary[Any, dict[BoundedProtocol, None]]] = WeakKeyDictionary()

    def __init__(self, config: Any, server_state: Any, app_state: Any, _loop: Any = None) -> None:
        super().__init__(config, server_state, app_state, _loop)
        # The connections of this server.  Those that have waited longest come first.
        self._order = self._orders.setdefault(server_state, {})
        self.conn = _Parser(config.h11_max_incomplete_event_size or 16 << 10)
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin, and make room if there are too many connections.

        Args:
            transport: the connection of asyncio.
        """
        transport.max_size = _READ_BYTES  # asyncio reads this much at a time
        super().connection_made(transport)
        self._order[self] = None
        self._arm()
        if len(self.connections) > most_connections():
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """End.

        Args:
            exc: why; None when it was closed in order.
        """
        self._disarm()
        self._order.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes.  The deadline runs until they are a whole request head.

        Args:
            data: what came.
        """
        if not self._active and self._deadline is None:
            self._arm()
        super().data_received(data)
        if self._active:
            self._disarm()
            if self.cycle.more_body and self.cycle.body:
                self.flow.pause_reading()  # until the application takes it

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        if self._order.pop(self, self) is None:
            self._order[self] = None
        super().on_response_complete()
        # The rest of a body that nobody reads, or the start of the next request.
        if not self._active and (self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]):
            self._arm()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not HTTP, and close the connection.

        Args:
            msg: the text of the answer.
        """
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # a response has begun
            self.transport.abort()

    @property
    def _active(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _waits(self) -> bool:
        """Whether the server waits for the client: for a request, for the rest of a body, or until it reads.

        A client that has sent its next requests already does not wait for this answer.
        """
        return not self._active or self.cycle.more_body or self.flow.write_paused or bool(self.conn.trailing_data[0])

    def _make_room(self) -> None:
        victim = next((one for one in self._order if one is not self and one._waits), self)
        victim.connections.discard(victim)
        victim._order.pop(victim, None)
        victim.transport.abort()

    def _arm(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_S, self._late)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        self.transport.abort()


class Upload:
    """One request body that is being read.

    Args:
        timer: ends the reading.
    """

    def __init__(self, timer: asyncio.Timeout) -> None:
        self.timer = timer
        self.large_since_s: float | None = None


class Uploads:
    """All request bodies that are being read.

    Small ones are read at once.  Large ones take turns: a few are read at a time, and each has only a
    fair time while others wait.  uvicorn reads no further from a connection whose body waits.

    Args:
        fair_s: most time for a large body while others wait.
    """

    def __init__(self, fair_s: float) -> None:
        self._fair_s = fair_s
        self._turns = asyncio.Semaphore(LARGE_AT_ONCE)
        self._large: set[Upload] = set()
        self._waiting = 0

    @asynccontextmanager
    async def reading(self, most_s: float) -> AsyncIterator[Upload]:
        """Read one body.

        Args:
            most_s: most time for the body.

        Yields:
            The upload; its reader calls ``grow`` for each part.

        Raises:
            TimeoutError: the body took too long.
        """
        async with asyncio.timeout(most_s) as timer:
            upload = Upload(timer)
            try:
                yield upload
            finally:
                if upload in self._large:
                    self._large.remove(upload)
                    self._turns.release()

    async def grow(self, upload: Upload, size: int) -> None:
        """Note the size of a body.  Waits for a turn when the body becomes a large one.

        Args:
            upload: the body.
            size: bytes that came, or that are announced.
        """
        if size <= SMALL_BYTES or upload in self._large:
            return
        self._waiting += 1
        try:
            self._hurry()
            await self._turns.acquire()
        finally:
            self._waiting -= 1
        upload.large_since_s = asyncio.get_running_loop().time()
        self._large.add(upload)
        self._hurry()

    def _hurry(self) -> None:
        """While bodies wait, bound the time of those that are read."""
        if not self._waiting or len(self._large) < LARGE_AT_ONCE:
            return
        now_s = asyncio.get_running_loop().time()
        for upload in self._large:
            end_s, fair_s = upload.timer.when(), (upload.large_since_s or now_s) + self._fair_s
            if end_s is not None and fair_s < end_s:
                upload.timer.reschedule(max(fair_s, now_s))
