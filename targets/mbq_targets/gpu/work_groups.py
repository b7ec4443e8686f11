"""The sizes of a GPU's work-groups."""

from __future__ import annotations

from dataclasses import dataclass

from mbq_runtime.bundle.layout import ROW_BLOCK


@dataclass(frozen=True)
class WorkGroups:
    """Sizes of work-groups, one row for each kind of GPU.

    rows: weight rows that a work-item handles: 1, 2 or 4. It loads their words as one vector.
    splits: work-items that share a row block along K.
    tile: tokens of a prompt that share an unpacked weight.
    token_threads: work-items that handle one token in norms and routers.
    attention_threads: positions that attention scores at a time.
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
        """Work-items of a work-group in ``matmul``."""
        return ROW_BLOCK // self.rows * self.splits
