"""What every reader of one device has in common."""

from __future__ import annotations

from typing import Any, ClassVar

from .host import Host, Unreadable
from .signal import Kind, Signal, signal

# Shorter spans make rates of counters that tick a hundred times a second too coarse.
_SHORTEST_SPAN_S = 0.4
NEEDS_SECOND_LOOK = "known from the second look on"


class Probe:
    """Reads one device: a folder or file found by ``sources.discover``.

    kind, name: of the signal that stands for the device until it has answered; also: further kinds of
    which such a signal must stand; every_s: how often it is worth reading; shown: a name better than the
    path's.
    """

    kind: Kind = Kind.CHIP
    also: ClassVar[tuple[Kind, ...]] = ()
    every_s: float = 0.0
    shown: ClassVar[str] = ""

    def __init__(self, host: Host, path: str) -> None:
        self.host = host
        self.path = path
        self.name = self.shown or path.rsplit("/", 1)[-1]

    def look(self) -> list[Signal]:
        """Read it now, however long that takes.  Raises Unreadable when nothing can be told."""
        raise NotImplementedError

    def unknown(self, problem: str) -> list[Signal]:
        """The device as a whole, without a value."""
        return [Signal(kind, self.name, None, self.path, problem=problem) for kind in (self.kind, *self.also)]

    def read(self, kind: Kind, name: str, file: str, scale: float = 1.0, **about: Any) -> Signal:
        """The number in ``file``, below this device's folder, times ``scale``."""
        source = f"{self.path}/{file}"
        try:
            return signal(kind, name, self.host.number(source) * scale, source, **about)
        except Unreadable as error:
            return Signal(kind, name, None, source, problem=str(error), **about)

    def number_or_none(self, file: str) -> int | None:
        try:
            return self.host.number(f"{self.path}/{file}")
        except Unreadable:
            return None


class Growth:
    """How much counters grew between two looks at least ``_SHORTEST_SPAN_S`` apart."""

    def __init__(self) -> None:
        self._base: tuple[float, ...] | None = None
        self._last: tuple[float, ...] | None = None

    def since(self, now_s: float, *counters: float, wraps_at: float = 0.0) -> tuple[float, ...] | None:
        """(seconds, growth of each counter); None at the first look and when a counter was reset."""
        now = (now_s, *counters)
        base = self._base
        if base is None or len(base) != len(now) or now_s < base[0]:
            self._base, self._last = now, None
        elif now_s - base[0] >= _SHORTEST_SPAN_S:
            grown = tuple(b - a if b >= a else b - a + wraps_at for a, b in zip(base, now, strict=True))
            self._base, self._last = now, grown if min(grown) >= 0 else None
        return self._last
