"""Records kernels, buffers and launches, and writes them as ``gpu/plan.json``.

See ``mbq_runtime.bundle.gpu_plan`` for what the plan's fields mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle import gpu_plan
from mbq_runtime.bundle.layout import PAGE_BYTES
from mbq_targets.gpu.kernel import Kernel
from mbq_targets.gpu.source import Source
from mbq_targets.gpu.source import lower as to_text

Array = NDArray[np.generic]

_SUFFIX = {"opencl": ".cl", "wgsl": ".wgsl"}
_SCRATCH, _CACHE = -1, -2
"""Offsets of buffers that the weights' file does not hold."""


class Launch(NamedTuple):
    """One launch of a kernel.

    kernel: what runs; buffers: name of the buffer by name of the kernel's argument; weight_bytes: bytes of weights
    that it reads, by depth.
    """

    kernel: Kernel
    buffers: Mapping[str, str]
    weight_bytes: list[int]


class Launches:
    """Programs that are being recorded.

    Args:
        depths: how many depths a matrix has.
    """

    def __init__(self, depths: int) -> None:
        self.depths = depths
        self.kernels: dict[str, Kernel] = {}
        self.tensors: dict[str, Array] = {}
        self.first_depths: dict[str, int] = {}
        self._pieces: dict[str, list[str]] = {}
        self.tables: list[NDArray[np.float32]] = []
        self.scratch_numbers: dict[str, int] = {}
        self.cache_bytes: dict[str, int] = {}
        self.programs: dict[str, list[Launch]] = {}
        self._program: list[Launch] = []

    def begin(self, program: str) -> None:
        """Record a new program from here on.

        Args:
            program: one of ``gpu_plan.PROGRAMS``.
        """
        self.programs[program] = self._program = []

    def tensor(self, name: str, value: Array) -> str:
        """Add a tensor to the weights' file, if there is none of this name.

        Args:
            name: of the tensor.
            value: any shape and dtype.

        Returns:
            The name.
        """
        self.tensors.setdefault(name, np.ascontiguousarray(value))
        return name

    def sliced(self, name: str, slices: Sequence[Array]) -> str:
        """Add the slices of a matrix to the weights' file, if there are none of this name.  They share a buffer.

        Args:
            name: of the buffer.
            slices: one for each depth, the first that is read first.

        Returns:
            The name.
        """
        if name not in self._pieces:
            self._pieces[name] = [self.tensor(f"{name}_{depth}", part) for depth, part in enumerate(slices, 1)]
            self.first_depths |= {piece: depth for depth, piece in enumerate(self._pieces[name], 1)}
        return name

    def scratch(self, name: str, numbers: int) -> str:
        """Reserve scratch memory on the device.  The largest request for a name counts.

        Args:
            name: of the buffer.
            numbers: float32 or int32 numbers.

        Returns:
            The name.
        """
        self.scratch_numbers[name] = max(self.scratch_numbers.get(name, 0), numbers)
        return name

    def cache(self, name: str, token_bytes: int) -> str:
        """Reserve a cache on the device.

        Args:
            name: of the buffer.
            token_bytes: its bytes for each token of context.

        Returns:
            The name.
        """
        self.cache_bytes[name] = token_bytes
        return name

    def table(self, table: NDArray[np.float32]) -> int:
        """Add a table of thresholds, if there is no equal one.

        Args:
            table: float32 [2, T], budgets and thresholds.

        Returns:
            Its number.
        """
        for number, seen in enumerate(self.tables):
            if np.array_equal(seen, table):
                return number
        self.tables.append(table)
        return len(self.tables) - 1

    def launch(self, kernel: Kernel, buffers: Mapping[str, str], weight_bytes: int | list[int] = 0) -> None:
        """Add a launch to the program.

        Args:
            kernel: what to run; of several kernels of one name, the first is used.
            buffers: name of the buffer by name of the argument, but for "state", "routing" and "order".
            weight_bytes: bytes of weights that it reads, at every depth or by depth.
        """
        kernel = self.kernels.setdefault(kernel.name, kernel)
        by_depth = weight_bytes if isinstance(weight_bytes, list) else [weight_bytes] * self.depths
        common = {"state": gpu_plan.STATE, "routing": gpu_plan.ROUTING, "order": "order"}
        self._program.append(Launch(kernel, common | dict(buffers), by_depth))

    def plan(self, dialect: str, **facts: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """Write the plan and translate the kernels.

        Args:
            dialect: "opencl" or "wgsl".
            **facts: fields of the plan that recording does not know: chunk, vocab_size, head_share.

        Returns:
            The contents of plan.json, and the kernels' texts by file name.

        Raises:
            BuildError: a kernel cannot be translated to the dialect.
        """
        sources = to_text(list(self.kernels.values()), dialect)
        files = {name: f"{name}{_SUFFIX[dialect]}" for name in sources}
        buffers = self._buffers(self.places())
        plan = {
            "dialect": dialect,
            **facts,
            "tables": [{"budgets": t[0].tolist(), "thresholds": t[1].tolist()} for t in self.tables],
            "needs": asdict(self._needs(buffers, sources)),
            "kernels": {
                name: {
                    "file": files[name],
                    "arguments": list(source.arguments),
                    "items": self.kernels[name].threads,
                    "local_bytes": source.local_bytes,
                }
                for name, source in sources.items()
            },
            "buffers": buffers,
            "programs": {
                name: [_launch_document(launch, sources[launch.kernel.name]) for launch in launches]
                for name, launches in self.programs.items()
            },
        }
        return plan, {files[name]: source.text for name, source in sources.items()}

    def places(self) -> dict[str, int]:
        """Where each tensor starts in the weights' file, in order: on a page, what depth 1 reads first."""
        places, offset = {}, 0
        for name in sorted(self.tensors, key=lambda name: self.first_depths.get(name, 1)):
            places[name] = offset
            offset = -(-(offset + self.tensors[name].nbytes) // PAGE_BYTES) * PAGE_BYTES
        return places

    def _buffers(self, places: Mapping[str, int]) -> dict[str, dict[str, Any]]:
        """Size and offset of every buffer."""
        buffers: dict[str, dict[str, Any]] = {
            name: {"bytes": 4 * count, "offset": _SCRATCH} for name, count in self.scratch_numbers.items()
        }
        buffers |= {name: {"bytes": size, "offset": _CACHE} for name, size in self.cache_bytes.items()}
        placed = {name: {"bytes": tensor.nbytes, "offset": places[name]} for name, tensor in self.tensors.items()}
        for name, names in self._pieces.items():
            pieces = [placed.pop(piece) for piece in names]
            size = sum(piece["bytes"] for piece in pieces)
            buffers[name] = {"bytes": size, "offset": pieces[0]["offset"], "pieces": pieces}
        return buffers | placed

    def _needs(self, buffers: Mapping[str, Mapping[str, Any]], sources: Mapping[str, Source]) -> gpu_plan.Needs:
        return gpu_plan.Needs(
            buffer_bytes=max(buffer["bytes"] for buffer in buffers.values()),
            group_items=max(kernel.threads for kernel in self.kernels.values()),
            local_bytes=max(source.local_bytes for source in sources.values()),
            bindings=max(len(source.arguments) for source in sources.values()),
        )


def _launch_document(launch: Launch, source: Source) -> dict[str, Any]:
    return {
        "kernel": launch.kernel.name,
        "grid": list(launch.kernel.grid),
        "buffers": [launch.buffers[name] for name in source.arguments],
        "weight_bytes": launch.weight_bytes,
    }
