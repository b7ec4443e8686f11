"""Runs a launch plan on a GPU: the common part of the engines "opencl" and "webgpu"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle import gpu_plan
from mbq_runtime.bundle.gpu_plan import LOGITS, RESULT, ROUTING, STATE, THRESHOLDS, TOKENS, Buffer, Kernel, Launch, Plan
from mbq_runtime.bundle.layout import ROW_BLOCK
from mbq_runtime.bundle.manifest import Manifest
from mbq_runtime.errors import BundleError, UsageError

from .tokenizer import Tokenizer

_FLOAT32_MAX = np.float32(3e38)


class Limits(NamedTuple):
    """What a device has.

    buffer_bytes: size of the largest buffer.
    group_items: most work items in a work-group.
    local_bytes: most memory that a work-group shares.
    bindings: most buffers of a kernel.
    """

    buffer_bytes: int
    group_items: int
    local_bytes: int
    bindings: int


class Device(Protocol):
    """A GPU and its queue, which keeps the order of runs, writes and reads.

    Making one raises UsageError when the package or a driver is missing.
    """

    def __init__(self) -> None: ...

    @property
    def name(self) -> str:
        """Name of the device and its driver."""

    @property
    def limits(self) -> Limits:
        """What the device has."""

    def compile(self, kernels: Mapping[str, Kernel], texts: Mapping[str, str], where: Path) -> None:
        """Compile all kernels.

        Args:
            kernels: by name.
            texts: source text by kernel name.
            where: folder of the texts, for messages.

        Raises:
            BundleError: the driver refuses a kernel; the message has its log.
        """

    def buffer(self, size: int, content: NDArray[np.generic] | None = None) -> Any:
        """Allocate memory on the device.

        Args:
            size: bytes.
            content: what is written into it; None for nothing.
        """

    def prepare(self, launches: Sequence[Launch], kernels: Mapping[str, Kernel], buffers: Mapping[str, Any]) -> Any:
        """Bind buffers to the kernels of a program.

        Args:
            launches: the program.
            kernels: by name.
            buffers: what ``buffer`` returned, by name.

        Returns:
            What ``run`` takes.
        """

    def run(self, prepared: Any) -> None:
        """Put a program into the queue.

        Args:
            prepared: what ``prepare`` returned.
        """

    def write(self, buffer: Any, content: NDArray[np.generic]) -> None:
        """Write to the start of a buffer.

        Args:
            buffer: what ``buffer`` returned.
            content: any array.
        """

    def read(self, buffer: Any, content: NDArray[np.generic]) -> None:
        """Wait for all that is in the queue, and read from the start of a buffer.

        Args:
            buffer: what ``buffer`` returned.
            content: the array that is filled.
        """


class DeviceBackend:
    """Loads a bundle's plan onto a device, see ``backend.Backend``.

    path: folder of the bundle.
    manifest: the bundle's manifest.
    threads: has no effect; the processor's part uses one thread.
    """

    device_type: ClassVar[type[Device]]
    """The device of a subclass."""
    dialect: ClassVar[str]
    """Language of the kernels that it compiles, see ``gpu_plan.Plan``."""
    keeps = rewinds = True
    marks, state_bytes = False, 0

    def __init__(self, path: Path, manifest: Manifest, threads: int) -> None:
        plan = gpu_plan.read_plan(path)
        if plan.dialect != self.dialect:
            raise BundleError(f"{path}: its kernels are {plan.dialect}, this engine compiles {self.dialect}")
        self.plan = plan
        self.device = self.device_type()
        _check_needs(plan, self.device, path)
        self.device.compile(plan.kernels, _texts(plan, path), path / gpu_plan.FOLDER)
        weights = np.memmap(path / gpu_plan.WEIGHTS, np.uint8, "r")
        _check_scales(plan, weights, manifest, path)
        self._buffers = {
            name: self.device.buffer(buffer.bytes, _content(buffer, weights) if buffer.content else None)
            for name, buffer in plan.buffers.items()
            if not buffer.is_cache
        }
        self.tokenizer = Tokenizer(path)
        self._path = path

    def use_threads(self, count: int) -> bool:
        """See ``backend.Backend``.

        Args:
            count: has no effect.
        """
        return False

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        return sum(buffer.bytes for buffer in self.plan.buffers.values() if buffer.is_cache)

    def start(self, length: int, budget: NDArray[np.float32]) -> DeviceContext:
        """See ``backend.Backend``.

        Args:
            length: most tokens of the context.
            budget: float32 [2], average bits per weight and the deepest depth; read again in every pass.

        Raises:
            UsageError: the device does not take buffers of that length.
        """
        plan, limit = self.plan, self.device.limits.buffer_bytes
        caches = {name: buffer.bytes * length for name, buffer in plan.buffers.items() if buffer.is_cache}
        largest = max(caches.values(), default=0)
        if largest > limit:
            raise UsageError(
                f"a context of {length} tokens needs buffers of {largest} bytes, {self.device.name} takes {limit}; "
                f"ask for at most {length * limit // largest} tokens"
            )
        buffers = self._buffers | {name: self.device.buffer(size) for name, size in caches.items()}
        programs = {
            name: self.device.prepare(launches, plan.kernels, buffers) for name, launches in plan.programs.items()
        }
        return DeviceContext(plan, self.device, buffers, programs, budget)


class DeviceContext:
    """One context on a device, see ``backend.Context``.

    plan: the bundle's plan.
    device: where it runs.
    buffers: all buffers of the plan, by name.
    programs: what ``Device.prepare`` returned, by the name of the program.
    budget: float32 [2], average bits per weight and the deepest depth; read again in every pass.
    """

    def __init__(
        self,
        plan: Plan,
        device: Device,
        buffers: Mapping[str, Any],
        programs: Mapping[str, Any],
        budget: NDArray[np.float32],
    ) -> None:
        self._plan, self._device, self._buffers, self._programs = plan, device, buffers, programs
        self._budget = budget
        self._position, self._count = 0, 0
        self._state = np.zeros(TOKENS + plan.chunk, np.int32)
        self._bits: float | None = 0.0  # None: the device has them, with those of the head
        self._logits: list[NDArray[np.float32]] = []

    def append(self, tokens: NDArray[np.int32], rows: int = 1) -> None:
        """Run passes over ``tokens``, as many as chunks of the plan are needed.

        Args:
            tokens: int32 [n], ids that are added to the context.
            rows: how many of the last tokens get logits.
        """
        self._logits, bits, first = [], 0.0, len(tokens) - rows
        for start in range(0, len(tokens), self._plan.chunk):
            part = tokens[start : start + self._plan.chunk]
            self._pass(part)
            scored = range(max(first - start, 0), len(part)) if rows > 1 else range(0)
            for row in scored:
                self._choose(row)
                self._logits.append(self._read_logits())
                bits += self._head_bits()
            if len(tokens) > 1 and len(scored) < len(part):
                bits += self._body_bits() * (len(part) - len(scored))
        self._bits = bits / len(tokens) if bits else None
        if rows == 1:
            self._choose(self._count - 1)

    def logits(self) -> NDArray[np.float32]:
        """float32 [rows, vocab]: logits of the last tokens of the last ``append``."""
        return np.stack(self._logits or [self._read_logits()])

    def _read_logits(self) -> NDArray[np.float32]:
        logits = np.empty(self._plan.vocab_size, np.float32)
        self._device.read(self._buffers[LOGITS], logits)
        return logits

    def bits_used(self) -> float:
        """Average bits per weight of the last pass, mean over its tokens."""
        if self._bits is None:
            self._bits = self._head_bits()
        return self._bits

    def rewind(self, count: int) -> None:
        """Drop the last tokens.

        Args:
            count: tokens that stay.
        """
        self._position, self._count = count, 0

    def kept(self, count: int) -> list[NDArray[Any]]:
        """Keys and values of the first tokens.

        Args:
            count: how many tokens.
        """
        found = []
        for name, size in self._caches():
            found.append(np.empty(size * count, np.uint8))
            self._device.read(self._buffers[name], found[-1])
        return found

    def keep(self, count: int, arrays: Sequence[NDArray[Any]]) -> None:
        """Take keys and values in place of those so far.

        Args:
            count: of how many tokens.
            arrays: what ``kept`` returned.
        """
        for (name, _), given in zip(self._caches(), arrays, strict=True):
            self._device.write(self._buffers[name], given)
        self._position, self._count = count, 0

    def _caches(self) -> list[tuple[str, int]]:
        """(name, bytes of a token) of each buffer of keys or values.  The first token comes first."""
        return [(name, buffer.bytes) for name, buffer in self._plan.buffers.items() if buffer.is_cache]

    def _pass(self, tokens: NDArray[np.int32]) -> None:
        """Run the blocks over ``tokens``.  ``_choose`` can then take a row of the residual stream."""
        self._position += self._count
        self._count = len(tokens)
        state = self._state
        state[:4] = self._position, self._count, 0, self._budget[1]
        state[THRESHOLDS : THRESHOLDS + len(self._plan.tables)] = thresholds(self._plan, self._budget[0]).view(np.int32)
        state[TOKENS:] = 0
        state[TOKENS : TOKENS + len(tokens)] = tokens
        self._device.write(self._buffers[STATE], state)
        self._device.run(self._programs["token" if len(tokens) == 1 else "prompt"])

    def _choose(self, row: int) -> None:
        if row:
            self._state[2] = row
            self._device.write(self._buffers[STATE], self._state)
        self._device.run(self._programs["choose"])

    def _head_bits(self) -> float:
        """Average bits per weight of the token whose logits are there, the head included."""
        result = np.empty(2, np.int32)
        self._device.read(self._buffers[RESULT], result)
        return float(result[1:].view(np.float32)[0])

    def _body_bits(self) -> float:
        """Mean over the pass's tokens, without the head: it runs for the last token of a prompt alone."""
        routing = np.empty(2 * self._plan.chunk, np.int32)
        self._device.read(self._buffers[ROUTING], routing)
        used = routing.reshape(-1, 2)[: self._count, 1].view(np.float32)
        return float(used.mean()) / (1 - self._plan.head_share)


def thresholds(plan: Plan, avg_bits: float) -> NDArray[np.float32]:
    """The thresholds of all tables of routers at a budget.

    Args:
        plan: has the tables.
        avg_bits: budget in average bits per weight.

    Returns:
        float32 [tables]: what a score must exceed for one more slice.  At the lowest budget of a table no score does,
        at the highest every score does.
    """
    found = []
    for table in plan.tables:
        at = np.interp(avg_bits, table.budgets, table.thresholds)
        low, high = avg_bits <= table.budgets[0], avg_bits >= table.budgets[-1]
        found.append(_FLOAT32_MAX if low else -_FLOAT32_MAX if high else at)
    return np.asarray(found, np.float32)


def _content(buffer: Buffer, weights: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The content of a buffer.  Slices that a trimmed bundle does not have are zeros: no token reads them."""
    found = [weights[piece.offset : piece.offset + piece.bytes] for piece in buffer.content]
    missing = buffer.bytes - sum(part.size for part in found)
    if missing:
        found.append(np.zeros(missing, np.uint8))
    return found[0] if len(found) == 1 else np.concatenate(found)


def _check_scales(plan: Plan, weights: NDArray[np.uint8], manifest: Manifest, path: Path) -> None:
    """Refuse factors of rows that are no numbers.  A GPU may compute on with NaN as if it were a number."""
    depths = manifest.profile.depths
    for name, buffer in plan.buffers.items():
        matrix = name.removesuffix(".scales")
        planes = plan.buffers.get(f"{matrix}.planes")
        if matrix == name or buffer.offset < 0 or planes is None:
            continue
        # A row has 2 bytes for each depth and 2 for each group, and a byte of planes for each weight.
        rows = (buffer.bytes // 2 - planes.bytes // manifest.group_size) // depths
        if rows < ROW_BLOCK or rows % ROW_BLOCK or buffer.bytes % (2 * rows):
            raise BundleError(
                f"{path / gpu_plan.PLAN}: {name} and its planes are of two sizes; export the bundle again"
            )
        scales = weights[buffer.offset : buffer.offset + buffer.bytes].reshape(rows // ROW_BLOCK, -1, 2 * ROW_BLOCK)
        if not np.isfinite(np.ascontiguousarray(scales[:, :depths]).view(np.float16)).all():
            raise BundleError(f"{path / gpu_plan.WEIGHTS}: {name} are not finite; export the bundle again")


def _check_needs(plan: Plan, device: Device, path: Path) -> None:
    labels = ("bytes in one buffer", "items in a work-group", "bytes of local memory", "buffers in a kernel")
    needs = (plan.needs.buffer_bytes, plan.needs.group_items, plan.needs.local_bytes, plan.needs.bindings)
    for label, need, limit in zip(labels, needs, device.limits, strict=True):
        if need > limit:
            raise UsageError(
                f"{path}: the bundle needs {need} {label}, {device.name} has {limit}; "
                "run a bundle for the processor (mbq-export --target), or a smaller model"
            )


def _texts(plan: Plan, path: Path) -> dict[str, str]:
    """The source text of each kernel.  Raises BundleError."""
    files: dict[str, str] = {}
    for kernel in plan.kernels.values():
        file = path / gpu_plan.FOLDER / kernel.file
        try:
            files.setdefault(kernel.file, file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{file}: cannot be read ({error}); copy or export the bundle again") from None
    return {name: files[kernel.file] for name, kernel in plan.kernels.items()}
