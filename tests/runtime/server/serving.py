"""A real server on a real port in this process, so that tests see the client and the server."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import uvicorn

from mbq_runtime import Engine
from mbq_runtime.control.bounds import BoundedEngine
from mbq_runtime.sensing.readings import Readings
from mbq_runtime.server.app import Server
from mbq_runtime.server.connections import Listener
from mbq_runtime.server.http import configure
from mbq_runtime.server.models import Models, named
from mbq_runtime.server.monitor_feed import MonitorFeed

PATIENCE_S = 20.0
SLOW_S = 0.05


@dataclass
class Steered:
    """The fields of ``Governor.status`` that the server reads."""

    avg_bits: float = 8.0
    reason: str = "no pressure"
    readings: Readings = field(default_factory=lambda: Readings(time_s=0.0))
    tokens_per_s: float | None = None
    avg_bits_used: float | None = None
    energy_j_per_token: float | None = None


class HandGovernor:
    """A governor whose readings the test sets, so that pages and figures can be checked exactly."""

    def __init__(self, bounded: BoundedEngine) -> None:
        self._bounded = bounded
        self._status = Steered(avg_bits=bounded.avg_bits)

    def status(self) -> Steered:
        return self._status

    def set(self, *, avg_bits: float | None = None, **changes: Any) -> None:
        """Set fields of the status and readings by name."""
        names = Readings.__dataclass_fields__
        readings = {k: v for k, v in changes.items() if k in names and k != "tokens_per_s"}
        rest = {k: v for k, v in changes.items() if k not in readings}
        if avg_bits is not None:
            self._bounded.avg_bits = avg_bits
            rest["avg_bits"] = avg_bits
        self._status = replace(self._status, readings=replace(self._status.readings, **readings), **rest)


@dataclass
class Running:
    url: str
    port: int
    server: Server
    governor: HandGovernor
    bounded: BoundedEngine
    feed: MonitorFeed
    loop: asyncio.AbstractEventLoop

    @property
    def tasks(self) -> int:
        """Number of tasks in the event loop of the server."""
        return len(asyncio.all_tasks(self.loop))

    def settled(self, idle_tasks: int) -> bool:
        worker = self.server.worker
        return not worker.running and worker.waiting == 0 and self.tasks <= idle_tasks


class _Runner(uvicorn.Server):
    """Looks every 10 ms whether it shall end; the original looks every 100 ms, and tests start many servers."""

    async def main_loop(self) -> None:
        ticks = 0
        while not await self.on_tick(ticks // 10):
            await asyncio.sleep(0.01)
            ticks += 1


@contextmanager
def serve(
    engine: Engine, *others: Engine, port: int = 0, queue_limit: int = 16, most_bytes: int | None = None, **options: Any
) -> Iterator[Running]:
    """Run a server.  port: 0 for a free one; most_bytes: of models in memory; options: arguments of ``Server``."""
    bounded = BoundedEngine(engine)
    governor = HandGovernor(bounded)
    feed = MonitorFeed(engine.manifest.model.name, lambda: runner.should_exit)

    def steer(one: Engine) -> Any:
        hands = BoundedEngine(one)
        return nullcontext((bounded, governor) if one is engine else (hands, HandGovernor(hands)))

    models = Models(
        named([(one.path.name, one, one.manifest.budget) for one in (engine, *others)]), steer, most_bytes=most_bytes
    )
    made = Server(models, feed, queue_limit=queue_limit, **options)
    runner = _Runner(configure(made.app))
    loops: list[asyncio.AbstractEventLoop] = []

    async def run(sock: socket.socket) -> None:
        loops.append(asyncio.get_running_loop())
        await runner.serve([sock])

    with Listener(fileno=socket.create_server(("127.0.0.1", port)).detach()) as sock:
        port = sock.getsockname()[1]
        thread = threading.Thread(target=lambda: asyncio.run(run(sock)), name="test-server")
        thread.start()
        try:
            wait_for(lambda: runner.started)
            yield Running(f"http://127.0.0.1:{port}", port, made, governor, bounded, feed, loops[0])
        finally:
            runner.should_exit = True
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "the server does not stop"


def wait_for(holds: Callable[[], bool], what: str = "it") -> None:
    """Wait until ``holds()``; fail when that takes too long."""
    end_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end_s, f"{what} did not happen within {PATIENCE_S:g} s"
        time.sleep(0.01)
