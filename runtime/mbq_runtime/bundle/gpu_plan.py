"""What a bundle for a GPU says: kernels, buffers, and the launches that make a pass (``gpu/plan.json``).

A plan is data: no position or token count appears in it.  Those lie in the buffer ``state``, which is
written before each pass::

    int32 position, count, row, 0;  float32 thresholds [4];  int32 tokens [chunk]

position: tokens in the cache before the pass; count: tokens of the pass; row: the one of them a next
token is wanted for; thresholds: of each table of routers at the budget.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mbq_runtime.bundle.manifest import GPU_FILES
from mbq_runtime.bundle.schema import decode
from mbq_runtime.errors import BundleError

PLAN, WEIGHTS = GPU_FILES
FOLDER = "gpu"

STATE, RESULT, ROUTING, LOGITS = "state", "result", "routing", "logits"
THRESHOLDS, TOKENS = 4, 8
"""Where they begin in ``state``, in words."""

PROGRAMS = ("prompt", "token", "choose")
"""Passes: over a chunk of a prompt, over one token, and the choice of the next token, which follows either."""


@dataclass(frozen=True)
class Kernel:
    """file: its text, in which the function is ``NAME_kernel``; arguments: names of its buffers in the order
    they are bound; items: of a work-group; local_bytes: memory a work-group shares."""

    file: str
    arguments: tuple[str, ...]
    items: int
    local_bytes: int


@dataclass(frozen=True)
class Buffer:
    """bytes: its size, or, of a cache, its size for each token of context; offset: where its content lies in
    the weights' file, -1 for scratch memory and -2 for a cache."""

    bytes: int
    offset: int

    @property
    def is_cache(self) -> bool:
        return self.offset == -2


@dataclass(frozen=True)
class Launch:
    """grid: work-groups; buffers: one for each argument; weight_bytes: of weights read at each depth."""

    kernel: str
    grid: tuple[int, ...]
    buffers: tuple[str, ...]
    weight_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Table:
    """How routers follow the budget: budgets, ascending, and the threshold of each."""

    budgets: tuple[float, ...]
    thresholds: tuple[float, ...]


@dataclass(frozen=True)
class Needs:
    """What the device must have.  buffer_bytes: of the largest buffer; group_items, local_bytes, bindings: of
    the most demanding kernel."""

    buffer_bytes: int
    group_items: int
    local_bytes: int
    bindings: int


@dataclass(frozen=True)
class Plan:
    """chunk: prompt tokens of a pass; head_share: of the head's weights in all routed ones."""

    dialect: str
    chunk: int
    vocab_size: int
    head_share: float
    tables: tuple[Table, ...]
    needs: Needs
    kernels: Mapping[str, Kernel]
    buffers: Mapping[str, Buffer]
    programs: Mapping[str, tuple[Launch, ...]]

    def bytes_per_token(self, depth: int) -> int:
        """Of weights that the launches of one decoded token read when every router says ``depth``."""
        return sum(launch.weight_bytes[depth - 1] for launch in self.decode_launches if launch.weight_bytes)

    @property
    def decode_launches(self) -> tuple[Launch, ...]:
        return (*self.programs["token"], *self.programs["choose"])


def read(folder: Path) -> Plan:
    """The plan of the bundle in ``folder``.  Raises BundleError."""
    path = folder / PLAN
    try:
        plan = decode(Plan, json.loads(path.read_bytes()), path)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: cannot be read ({error}); copy or export the bundle again") from None
    for name, launches in plan.programs.items():
        for launch in launches:
            kernel = plan.kernels.get(launch.kernel)
            unknown = [buffer for buffer in launch.buffers if buffer not in plan.buffers]
            if kernel is None or unknown or len(launch.buffers) != len(kernel.arguments) or len(launch.grid) != 2:
                raise BundleError(f"{path}: a launch of {launch.kernel} in {name} is broken; export the bundle again")
    missing = [name for name in PROGRAMS if name not in plan.programs]
    missing += [name for name in (STATE, RESULT, ROUTING, LOGITS) if name not in plan.buffers]
    if missing:
        raise BundleError(f"{path}: no {missing[0]}; export the bundle again")
    return plan
