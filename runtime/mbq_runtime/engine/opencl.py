"""The engine "opencl": a bundle's plan on a device of the system's OpenCL."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.gpu_plan import Kernel, Launch
from mbq_runtime.cache import cache_dir
from mbq_runtime.errors import UsageError
from mbq_runtime.whole_file import write_whole

from . import gpu
from .gpu import DeviceBackend, Limits
from .imports import does_not_compile


class Device(gpu.Device):
    """The first GPU that OpenCL lists, or else its first device.  See ``gpu.Device``."""

    def __init__(self) -> None:
        try:
            import pyopencl as cl
        except ImportError as error:
            raise UsageError(f"the engine opencl needs pyopencl ({error}): pip install 'mbq-export[opencl]'") from None
        self._cl = cl
        try:
            devices = [device for platform in cl.get_platforms() for device in platform.get_devices()]
        except cl.Error as error:
            raise UsageError(f"OpenCL finds no platform ({error}); install the driver of your GPU, an ICD") from None
        if not devices:
            raise UsageError("OpenCL finds no device; install the driver of your GPU, an ICD")
        self._device = next((d for d in devices if d.type & cl.device_type.GPU), devices[0])
        self._context = cl.Context([self._device])
        self._queue = cl.CommandQueue(self._context)
        self._program: Any = None

    @property
    def name(self) -> str:
        return (
            f"{self._device.name.strip()} ({self._device.platform.name.strip()} {self._device.driver_version.strip()})"
        )

    @property
    def limits(self) -> Limits:
        device = self._device
        # OpenCL bounds the bytes of a kernel's arguments, not their number; a pointer is eight of them.
        return Limits(
            device.max_mem_alloc_size, device.max_work_group_size, device.local_mem_size, device.max_parameter_size // 8
        )

    def compile(self, kernels: Mapping[str, Kernel], texts: Mapping[str, str], where: Path) -> None:
        # The cache has binaries of exactly this driver and these texts.
        source = "\n".join(dict.fromkeys(texts.values()))
        cached = cache_dir() / "opencl" / f"{_key(self.name, self._device.platform.version, source)}.clbin"
        self._program = self._from_binary(cached)
        if self._program is not None:
            return
        try:
            self._program = self._cl.Program(self._context, source).build()
        except self._cl.Error as error:
            raise does_not_compile(where, self.name, "the kernels", error) from None
        _store(cached, self._program.get_info(self._cl.program_info.BINARIES)[0])

    def _from_binary(self, cached: Path) -> Any:
        try:
            return self._cl.Program(self._context, [self._device], [cached.read_bytes()]).build()
        except (OSError, self._cl.Error):
            return None  # there is none yet, or the driver refuses it

    def buffer(self, size: int, content: NDArray[np.generic] | None = None) -> Any:
        flags = self._cl.mem_flags
        if content is None:
            return self._cl.Buffer(self._context, flags.READ_WRITE, size)
        return self._cl.Buffer(self._context, flags.READ_ONLY | flags.COPY_HOST_PTR, hostbuf=content)

    def prepare(self, launches: Sequence[Launch], kernels: Mapping[str, Kernel], buffers: Mapping[str, Any]) -> Any:
        prepared = []
        for launch in launches:
            kernel = self._cl.Kernel(self._program, f"{launch.kernel}_kernel")
            kernel.set_args(*(buffers[name] for name in launch.buffers))
            items = kernels[launch.kernel].items
            prepared.append((kernel, (launch.grid[0] * items, launch.grid[1]), (items, 1)))
        return prepared

    def run(self, prepared: Any) -> None:
        for kernel, items, group in prepared:
            self._cl.enqueue_nd_range_kernel(self._queue, kernel, items, group)
        self._queue.flush()

    def write(self, buffer: Any, content: NDArray[np.generic]) -> None:
        self._cl.enqueue_copy(self._queue, buffer, content)

    def read(self, buffer: Any, content: NDArray[np.generic]) -> None:
        self._cl.enqueue_copy(self._queue, content, buffer)


class Backend(DeviceBackend):
    """Runs kernels of the dialect "opencl", see ``DeviceBackend``."""

    device_type = Device
    dialect = "opencl"


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _store(path: Path, binary: bytes) -> None:
    """Write to the cache.  A cache that cannot be written is no error."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, binary)
