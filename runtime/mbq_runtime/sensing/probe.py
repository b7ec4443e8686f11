"""The base class of the readers of devices, and the growth of counters."""

from __future__ import annotations

from typing import Any, ClassVar

from .host import Host, Unreadable
from .signal import Kind, Signal, signal

# Counters step 100 times a second.  A rate over a shorter time is too coarse.
_SHORTEST_SPAN_S = 0.4
NEEDS_SECOND_LOOK = "needs a second look"


class Probe:
    """The reader of one device.  A subclass implements ``look``.

    Args:
        host: the machine.
        path: folder or file of the device.
    """

    kind: Kind = Kind.CHIP
    """Kind of the signal that is given while the device has not answered."""
    also: ClassVar[tuple[Kind, ...]] = ()
    """More kinds for which such a signal is given."""
    every_s: float = 0.0
    """Shortest time between two looks, in s."""
    shown: ClassVar[str] = ""
    """Name of the signal; "": the last part of the path."""

    def __init__(self, host: Host, path: str) -> None:
        self.host = host
        self.path = path
        self.name = self.shown or path.rsplit("/", 1)[-1]

    def look(self) -> list[Signal]:
        """Read the device now.  This can take any time.

        Raises:
            Unreadable: the device gives no value at all.
        """
        raise NotImplementedError

    def unknown(self, problem: str) -> list[Signal]:
        """The signals of a device without values.

        Args:
            problem: the reason.
        """
        return [Signal(kind, self.name, None, self.path, problem=problem) for kind in (self.kind, *self.also)]

    def read(self, kind: Kind, name: str, file: str, scale: float = 1.0, **about: Any) -> Signal:
        """The signal of a number in a file.

        Args:
            kind: what the number measures.
            name: name of the sensor.
            file: the file, below the folder of this device.
            scale: factor from the number to the unit of ``kind``.
            about: ``limit``, ``hard_limit`` and ``note`` of the signal.
        """
        source = f"{self.path}/{file}"
        try:
            return signal(kind, name, self.host.number(source) * scale, source, **about)
        except Unreadable as error:
            return Signal(kind, name, None, source, problem=str(error), **about)

    def number_or_none(self, file: str) -> int | None:
        """The number in a file; None when it cannot be read.

        Args:
            file: the file, below the folder of this device.
        """
        try:
            return self.host.number(f"{self.path}/{file}")
        except Unreadable:
            return None


class Growth:
    """The growth of counters between two looks that are at least 0.4 s apart."""

    def __init__(self) -> None:
        self._base: tuple[float, ...] | None = None
        self._last: tuple[float, ...] | None = None

    def since(self, now_s: float, *counters: float, wraps_at: float = 0.0) -> tuple[float, ...] | None:
        """The growth since an earlier look.

        Args:
            now_s: time of this look, in s.
            counters: values of the counters now.
            wraps_at: value at which the counters start again from 0; 0: never.

        Returns:
            (time in s, growth of each counter); None at the first look and after a counter was reset.
        """
        now = (now_s, *counters)
        base = self._base
        if base is None or len(base) != len(now) or now_s < base[0]:
            self._base, self._last = now, None
        elif now_s - base[0] >= _SHORTEST_SPAN_S:
            grown = tuple(b - a if b >= a else b - a + wraps_at for a, b in zip(base, now, strict=True))
            self._base, self._last = now, grown if min(grown) >= 0 else None
        return self._last
