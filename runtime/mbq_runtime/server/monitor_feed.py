"""The data of the monitor page: one sample a second and each change of the budget, for the last minutes."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .replies import event

if TYPE_CHECKING:
    from mbq_runtime.control.events import Event

    from .models import Models
    from .worker import Worker

_PERIOD_S = 1.0
_SAMPLES, _EVENTS = 300, 100

READINGS = (
    "temp_c", "throttle_temp_c", "heat_throttled", "undervoltage", "power_w", "discharging", "battery_fraction",
)  # fmt: skip


class MonitorFeed:
    """Keeps the last samples and events, and streams them to any number of clients.

    Args:
        model: name of the model, or names of several.
        closing: returns whether the server stops; then the streams end.
    """

    def __init__(self, model: str, closing: Callable[[], bool] = lambda: False) -> None:
        self._model, self._closing = model, closing
        self._samples: deque[dict[str, Any]] = deque(maxlen=_SAMPLES)
        self._events: deque[dict[str, Any]] = deque(maxlen=_EVENTS)
        self._fresh: deque[dict[str, Any]] = deque(maxlen=_EVENTS)
        self._count = 0
        self._changed = asyncio.Condition()

    def add_event(self, change: Event) -> None:
        """Add an event of the governor.  It can be called from any thread.

        Args:
            change: the event.
        """
        self._fresh.append({"time": change.time_s, "old": change.old, "new": change.new, "reason": change.reason})

    @property
    def closing(self) -> bool:
        """Whether the server stops."""
        return self._closing()

    async def keep(self, sample: Callable[[], dict[str, Any]]) -> None:
        """Take one sample a second until the task is cancelled.

        Args:
            sample: returns the values of one sample.
        """
        while True:
            async with self._changed:
                self._add(self._samples, {"time": time.time(), **sample()})
                while self._fresh:
                    self._add(self._events, self._fresh.popleft())
                self._changed.notify_all()
            await asyncio.sleep(_PERIOD_S)

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events {"model", "samples": [...], "events": [...]}: first everything kept, then new entries."""
        seen = 0
        while not self._closing():
            new = {
                name: [entry for entry in kept if entry["n"] > seen]
                for name, kept in (("samples", self._samples), ("events", self._events))
            }
            yield event({"model": self._model, **new})
            seen = self._count
            async with self._changed:
                await self._changed.wait()

    def _add(self, where: deque[dict[str, Any]], entry: dict[str, Any]) -> None:
        self._count += 1
        where.append({"n": self._count, **entry})


class FeedSampler:
    """Makes one sample.  A reading is null when it is unknown; tokens_per_s is null when no reply is made.

    Args:
        models: the one in use gives readings and the reason of the budget.
        worker: gives the number of waiting requests.
    """

    def __init__(self, models: Models, worker: Worker) -> None:
        self._models, self._worker = models, worker

    def __call__(self) -> dict[str, Any]:
        """The values of a sample of now."""
        status, worker, bounded = self._models.governor.status(), self._worker, self._models.bounded
        readings = asdict(status.readings)
        asked = bounded.is_limiting
        return {
            "avg_bits": bounded.avg_bits if asked else status.avg_bits,
            "reason": "set by the request" if asked else status.reason,
            "tokens_per_s": status.tokens_per_s,
            "avg_bits_used": status.avg_bits_used,
            "energy_j_per_token": status.energy_j_per_token,
            "running": int(worker.running),
            "waiting": worker.waiting,
            **{name: readings[name] for name in READINGS},
        }
