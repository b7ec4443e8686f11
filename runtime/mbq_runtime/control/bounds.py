"""An engine whose budget stays within bounds that a request, or the user of a chat, sets for a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mbq_runtime.bundle.manifest import Manifest
    from mbq_runtime.engine import Engine


class BoundedEngine:
    """The engine that a governor controls.  It keeps the governor's budget within the bounds in force.

    It remembers the budget that the governor set.  When the bounds are removed, the engine uses that budget again
    at once.  It is safe to use from any thread.

    Args:
        engine: a loaded engine.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._wish = engine.avg_bits
        self._bounds: tuple[float | None, float | None] = (None, None)
        self._lock = threading.Lock()

    @property
    def manifest(self) -> Manifest:
        """The manifest of the engine's bundle."""
        return self._engine.manifest

    @property
    def avg_bits(self) -> float:
        """The budget that the engine uses, in average bits per weight.

        Args:
            value: the budget that the governor wants; the bounds apply to it.

        Raises:
            UsageError: the bundle does not have this budget.
        """
        return self._engine.avg_bits

    @avg_bits.setter
    def avg_bits(self, value: float) -> None:
        with self._lock:
            self._wish = self.manifest.budget.check(value, str(self._engine.path))
            self._apply()

    @property
    def ceiling_bits(self) -> float:
        """Most bits per weight that a token can read now; fewer than the bundle has while a part of it is coming."""
        ceiling = self._engine.ceiling_bits
        return self.manifest.budget.max_bits if ceiling is None else ceiling

    @property
    def threads(self) -> int:
        """Number of processor threads that the engine uses.

        Args:
            count: the new number.
        """
        return self._engine.threads

    @threads.setter
    def threads(self, count: int) -> None:
        self._engine.threads = count

    @property
    def speculate(self) -> str:
        """Whether the engine guesses tokens, see ``Engine.speculate``.

        Args:
            mode: the new value.
        """
        return self._engine.speculate

    @speculate.setter
    def speculate(self, mode: str) -> None:
        self._engine.speculate = mode

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
        """Whether the bounds change the budget that the governor wants."""
        return self._within(self._wish) != self._wish

    def set_bounds(self, floor_bits: float | None, ceiling_bits: float | None) -> None:
        """Bound the budget from now on.

        Args:
            floor_bits: lowest average bits per weight, within the bundle's budget; None: no floor.
            ceiling_bits: highest average bits per weight, within the bundle's budget; None: no ceiling.
        """
        with self._lock:
            self._bounds = (floor_bits, ceiling_bits)
            self._apply()

    @contextmanager
    def within_bounds(self, floor_bits: float | None, ceiling_bits: float | None) -> Iterator[None]:
        """Bound the budget inside a ``with`` block, then restore the earlier bounds.

        Args:
            floor_bits: see ``set_bounds``.
            ceiling_bits: see ``set_bounds``.
        """
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
