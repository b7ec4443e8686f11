"""The plan of a bundle for a GPU (``gpu/plan.json``): kernels, buffers, and the launches of a pass.

A plan has no position and no token count.  Those are in the buffer ``state``, which the engine writes before each
pass::

    int32 position, count, row, deepest;  float32 thresholds [4];  int32 tokens [chunk]

position: tokens in the cache before the pass.
count: tokens of the pass.
row: the token of the pass that a next token is wanted for.
deepest: the most that a depth may be.
thresholds: one for each table of routers, at the budget of the pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import BundleError
from .file_names import GPU_FILES
from .reading import read_json
from .schema import decode

PLAN, WEIGHTS = GPU_FILES
FOLDER = "gpu"
_MOST_BYTES = 4 << 20  # of the file; the plan of a model with 80 blocks has about one
_MOST_CHUNK = 8192  # tokens
_MOST_BUFFER_BYTES = 1 << 40

STATE, RESULT, ROUTING, LOGITS = "state", "result", "routing", "logits"
THRESHOLDS, TOKENS = 4, 8
"""Where thresholds and tokens begin in ``state``, in 32-bit words."""

PROGRAMS = ("prompt", "token", "choose")
"""A pass over a chunk of a prompt, a pass over one token, and the choice of the next token after either."""


@dataclass(frozen=True)
class Kernel:
    """A function that the device compiles.

    file: name of its source text below ``gpu/``; the function there is ``NAME_kernel``.
    arguments: names of its buffers, in the order in which they are bound.
    items: work items in a work-group.
    local_bytes: memory that a work-group shares.
    """

    file: str
    arguments: tuple[str, ...]
    items: int
    local_bytes: int


@dataclass(frozen=True)
class Piece:
    """A part of a buffer's content, which lies in the weights' file by itself.

    offset: its place in the file, in bytes.
    bytes: its size.
    """

    offset: int
    bytes: int


@dataclass(frozen=True)
class Buffer:
    """Memory on the device.

    bytes: size; of a cache: size for each token of context.
    offset: place of its content in the weights' file; -1 for scratch memory, -2 for a cache.
    pieces: the slices of a matrix, in the order in which they follow each other in the buffer; empty for a content
        that lies in one place.
    """

    bytes: int
    offset: int
    pieces: tuple[Piece, ...] = ()

    @property
    def is_cache(self) -> bool:
        """Whether its size grows with the context."""
        return self.offset == -2

    @property
    def content(self) -> tuple[Piece, ...]:
        """Where its content lies in the weights' file, in order; empty for memory without content."""
        return self.pieces or ((Piece(self.offset, self.bytes),) if self.offset >= 0 else ())


@dataclass(frozen=True)
class Launch:
    """One run of a kernel.

    kernel: its name.
    grid: number of work-groups, [x, y].
    buffers: name of a buffer for each argument.
    weight_bytes: bytes of weights that it reads at each depth; empty for a kernel without weights.
    """

    kernel: str
    grid: tuple[int, ...]
    buffers: tuple[str, ...]
    weight_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Table:
    """How routers follow the budget.

    budgets: average bits per weight, ascending.
    thresholds: what a router's score must exceed for one more slice, at each of the budgets.
    """

    budgets: tuple[float, ...]
    thresholds: tuple[float, ...]


@dataclass(frozen=True)
class Needs:
    """What the device must have.

    buffer_bytes: size of the largest buffer.
    group_items: most work items in a work-group.
    local_bytes: most memory that a work-group shares.
    bindings: most buffers of a kernel.
    """

    buffer_bytes: int
    group_items: int
    local_bytes: int
    bindings: int


@dataclass(frozen=True)
class Plan:
    """All of ``gpu/plan.json``.

    dialect: language of the kernels: "opencl" or "wgsl".
    chunk: prompt tokens of a pass.
    vocab_size: logits of a token.
    head_share: the head's share of all routed weights, from 0 to 1.
    tables: of routers.
    needs: what the device must have.
    kernels: by name.
    buffers: by name.
    programs: launches by name, see ``PROGRAMS``.
    """

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
        """Bytes of weights that one decoded token reads when every router chooses the same depth.

        Args:
            depth: 1-based.
        """
        return sum(launch.weight_bytes[depth - 1] for launch in self.decode_launches if launch.weight_bytes)

    @property
    def decode_launches(self) -> tuple[Launch, ...]:
        """The launches of one decoded token."""
        return (*self.programs["token"], *self.programs["choose"])


def read_plan(folder: Path) -> Plan:
    """Read and check the plan of a bundle.

    Args:
        folder: folder of the bundle.

    Raises:
        BundleError: the plan cannot be read, or a launch names what is not there.
    """
    path = folder / PLAN
    plan = decode(Plan, read_json(path, _MOST_BYTES), path)
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
    for holds, what in _rules(plan):
        if not holds:
            raise BundleError(f"{path}: {what}; export the bundle again")
    return plan


def _rules(plan: Plan) -> Iterator[tuple[bool, str]]:
    """What must hold of the numbers in a plan, and the words for where it does not."""
    yield 0 < plan.chunk <= _MOST_CHUNK, f"chunk is {plan.chunk}, needed 1 to {_MOST_CHUNK}"
    yield 0 <= plan.head_share < 1, f"head_share is {plan.head_share:g}, needed 0 or above and below 1"
    yield len(plan.tables) <= TOKENS - THRESHOLDS, f"{len(plan.tables)} tables, needed at most {TOKENS - THRESHOLDS}"
    for table in plan.tables:
        ascending = list(table.budgets) == sorted(table.budgets) and len(table.budgets) == len(table.thresholds) > 0
        yield ascending, "a table's budgets do not ascend, or do not fit its thresholds"
    for name, buffer in plan.buffers.items():
        fits = 0 < buffer.bytes <= _MOST_BUFFER_BYTES and buffer.bytes % 4 == 0
        placed = buffer.offset in (-1, -2) or (buffer.offset >= 0 and buffer.offset % 4 == 0)
        yield fits and placed, f"size or place of {name[:80]} is not possible ({buffer.bytes}, {buffer.offset})"
        held = sum(piece.bytes for piece in buffer.pieces) in (0, buffer.bytes)
        whole = all(piece.bytes > 0 and piece.bytes % 4 == piece.offset % 4 == 0 for piece in buffer.pieces)
        whole = whole and all(piece.offset >= 0 for piece in buffer.pieces) and held
        yield whole and (not buffer.pieces or buffer.offset >= 0), f"the pieces of {name[:80]} do not make a whole"
    words = {STATE: TOKENS + plan.chunk, RESULT: 2, ROUTING: 2 * plan.chunk, LOGITS: plan.vocab_size}
    for name, count in words.items():
        yield plan.buffers[name].bytes >= 4 * count, f"{name} has {plan.buffers[name].bytes} bytes, needed {4 * count}"
