"""Runs single kernels on the devices of this machine: PoCL for OpenCL, lavapipe for WebGPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.gpu_plan import Kernel as PlanKernel
from mbq_runtime.bundle.gpu_plan import Launch
from mbq_runtime.engine import opencl, webgpu
from mbq_targets.gpu.kernel import Kernel
from mbq_targets.gpu.source import Source, lower

os.environ.setdefault("XDG_RUNTIME_DIR", "/tmp")  # the loader of display drivers complains without one

Array = NDArray[Any]


class Runner:
    """One device that compiles and launches a kernel at a time.

    Args:
        dialect: language of the kernels, "opencl" or "wgsl".
        device: what compiles and launches them.
    """

    def __init__(self, dialect: str, device: Any) -> None:
        self.dialect, self.device = dialect, device
        self._compiled: tuple[Kernel, Source] | None = None

    def _source(self, kernel: Kernel) -> Source:
        """The source of a kernel, which is compiled when another one was launched before it."""
        if self._compiled is None or self._compiled[0] is not kernel:
            source = lower([kernel], self.dialect)[kernel.name]
            self.device.compile({kernel.name: _planned(kernel, source)}, {kernel.name: source.text}, Path("test"))
            self._compiled = kernel, source
        return self._compiled[1]

    def __call__(self, kernel: Kernel, arrays: Mapping[str, Array], *results: str) -> list[Array]:
        """Launch ``kernel`` over ``arrays`` by argument; copies of ``results`` after it."""
        source = self._source(kernel)
        kernels = {kernel.name: _planned(kernel, source)}
        buffers = {}
        for name in source.arguments:
            content = np.ascontiguousarray(arrays[name])
            buffers[name] = self.device.buffer(content.nbytes)
            self.device.write(buffers[name], content)
        launch = Launch(kernel.name, kernel.grid, source.arguments, ())
        self.device.run(self.device.prepare([launch], kernels, buffers))
        found = []
        for name in results:
            content = np.empty_like(np.ascontiguousarray(arrays[name]))
            self.device.read(buffers[name], content)
            found.append(content)
        return found


def _planned(kernel: Kernel, source: Source) -> PlanKernel:
    """The entry of a kernel in a plan."""
    return PlanKernel("", source.arguments, kernel.threads, 0)


DEVICES = {"opencl": opencl.Device, "wgsl": webgpu.Device}
"""By dialect."""


def state(position: int = 0, count: int = 1, row: int = 0, threshold: float = 0.0, tokens: Any = (0,)) -> Array:
    """The buffer ``state`` of a pass over ``tokens``, with no bound on depths."""
    head = np.array([position, count, row, 8, 0, 0, 0, 0], np.int32)
    head[4:5] = np.array([threshold], np.float32).view(np.int32)
    return np.concatenate([head, np.asarray(tokens, np.int32)])


def routing(depth: Any) -> Array:
    """The buffer ``routing`` with these depths and nothing used."""
    return np.stack([np.asarray(depth, np.int32), np.zeros(len(depth), np.int32)], axis=1)
