"""What a controller learned about its board and bundle.  Everything in it is bounded, and forgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .heat import Heat
from .token_time import TokenTime
from .watts import Watts

_MOST_LINES = 64


@dataclass(frozen=True)
class Learned:
    """The models of a board.

    Args:
        token_times: time of a token by its bytes, for each number of threads.
        heat: temperature by power or, on a board without a power sensor, by load.
        watts: power by what is decoded.
    """

    token_times: Mapping[int, TokenTime] = field(default_factory=dict)
    heat: Heat = field(default_factory=Heat)
    watts: Watts = field(default_factory=Watts)

    def token_time(self, threads: int) -> TokenTime:
        """The line of a number of threads.

        Args:
            threads: number of threads that the engine uses.
        """
        return self.token_times.get(threads, TokenTime())

    def with_token(self, threads: int, part: float, token_s: float, elapsed_s: float) -> Learned:
        """The models after some tokens that nothing slowed.

        Args:
            threads: number of threads that the engine used.
            part: bytes of a token over its bytes at the highest budget.
            token_s: mean time of a token in s.
            elapsed_s: time in s since the last tokens.
        """
        if threads not in self.token_times and len(self.token_times) >= _MOST_LINES:
            return self
        line = self.token_time(threads).after(part, token_s, elapsed_s)
        return replace(self, token_times={**self.token_times, threads: line})
