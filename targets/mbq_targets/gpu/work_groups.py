"""What differs between GPUs: numbers, one row for each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """Shapes of the work-groups.

    rows: weight rows an item holds, and so the words of one vector load (1, 2 or 4); splits: items that
    share a row block along K; tile: tokens of a prompt that share an unpacked weight; token_threads: items
    that work on one token in norms and routers; attention_threads: positions scored at a time;
    chunk: prompt tokens of a pass.
    """

    rows: int
    splits: int
    tile: int
    token_threads: int
    attention_threads: int
    chunk: int = 32

    @property
    def matmul_threads(self) -> int:
        return 16 // self.rows * self.splits
