"""Bounds of the moment between a governor and an engine: what a request, or the person at the keyboard, asks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mbq_runtime.bundle.manifest import Manifest
    from mbq_runtime.engine import Engine


class BoundedEngine:
    """The engine as its governor sees it.  What the governor sets is held within the bounds in force.

    The governor's wish is kept: when bounds are lifted, the engine is back at it at once.  Any thread
    may use it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._wish = engine.avg_bits
        self._bounds: tuple[float | None, float | None] = (None, None)
        self._lock = threading.Lock()

    @property
    def manifest(self) -> Manifest:
        return self._engine.manifest

    @property
    def avg_bits(self) -> float:
        """What the engine uses.  Setting it is a wish; raises UsageError as the engine does."""
        return self._engine.avg_bits

    @avg_bits.setter
    def avg_bits(self, value: float) -> None:
        with self._lock:
            self._wish = self.manifest.budget.check(value, str(self._engine.path))
            self._apply()

    @property
    def threads(self) -> int:
        """The engine's."""
        return self._engine.threads

    @threads.setter
    def threads(self, count: int) -> None:
        self._engine.threads = count

    def add_listener(self, listener: Callable[[float, float], None]) -> None:
        """Pass a listener on to the engine.

        Args:
            listener: see ``Engine.add_listener``.
        """
        self._engine.add_listener(listener)

    def remove_listener(self, listener: Callable[[float, float], None]) -> None:
        """Take a listener away from the engine.

        Args:
            listener: what ``add_listener`` was given.
        """
        self._engine.remove_listener(listener)

    @property
    def is_limiting(self) -> bool:
        """Whether the bounds keep the engine from what the governor wants."""
        return self._within(self._wish) != self._wish

    def set_bounds(self, floor_bits: float | None, ceiling_bits: float | None) -> None:
        """Bound the budget from now on; None is no bound.  Both must be within the bundle's budget."""
        with self._lock:
            self._bounds = (floor_bits, ceiling_bits)
            self._apply()

    @contextmanager
    def within_bounds(self, floor_bits: float | None, ceiling_bits: float | None) -> Iterator[None]:
        """The same for the length of a block."""
        before = self._bounds
        self.set_bounds(floor_bits, ceiling_bits)
        try:
            yield
        finally:
            self.set_bounds(*before)

    def _apply(self) -> None:
        self._engine.avg_bits = self._within(self._wish)

    def _within(self, bits: float) -> float:
        floor, ceiling = self._bounds
        if floor is not None:
            bits = max(bits, floor)
        return bits if ceiling is None else min(bits, ceiling)
