"""The engine "webgpu": a bundle's plan on a driver for Vulkan, Metal or Direct3D, through wgpu."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.gpu_plan import Kernel, Launch
from mbq_runtime.errors import UsageError

from . import gpu
from .gpu import DeviceBackend, Limits
from .imports import does_not_compile

# Limits that are raised from the standard's defaults to those of the adapter.
_LIMITS = (
    "max-buffer-size", "max-storage-buffer-binding-size", "max-compute-workgroup-storage-size",
    "max-compute-invocations-per-workgroup", "max-compute-workgroup-size-x", "max-storage-buffers-per-shader-stage",
)  # fmt: skip


class Device(gpu.Device):
    """The adapter with the highest performance, by wgpu's choice.  See ``gpu.Device``."""

    def __init__(self) -> None:
        try:
            import wgpu
        except ImportError as error:
            raise UsageError(f"the engine webgpu needs wgpu ({error}): pip install 'mbq-export[webgpu]'") from None
        self._wgpu = wgpu
        try:
            adapter = wgpu.gpu.request_adapter_sync(power_preference="high-performance")
            limits = {name: adapter.limits[name] for name in _LIMITS}
            self._device = adapter.request_device_sync(required_limits=limits)
        except RuntimeError as error:
            raise UsageError(f"WebGPU finds no adapter ({error}); install a Vulkan driver for your GPU") from None
        self._info, self._limits = adapter.info, limits
        self._pipelines: dict[str, Any] = {}
        self._last_groups: dict[int, Any] = {}

    @property
    def name(self) -> str:
        return f"{self._info['device']} ({self._info['backend_type']}, {self._info['description']})"

    @property
    def limits(self) -> Limits:
        return Limits(
            min(self._limits["max-buffer-size"], self._limits["max-storage-buffer-binding-size"]),
            min(self._limits["max-compute-invocations-per-workgroup"], self._limits["max-compute-workgroup-size-x"]),
            self._limits["max-compute-workgroup-storage-size"],
            self._limits["max-storage-buffers-per-shader-stage"],
        )

    def compile(self, kernels: Mapping[str, Kernel], texts: Mapping[str, str], where: Path) -> None:
        for name in kernels:
            try:
                module = self._device.create_shader_module(code=texts[name])
                self._pipelines[name] = self._device.create_compute_pipeline(
                    layout="auto", compute={"module": module, "entry_point": f"{name}_kernel"}
                )
            except self._wgpu.GPUError as error:
                raise does_not_compile(where, self.name, f"kernel {name}", error) from None

    def buffer(self, size: int, content: NDArray[np.generic] | None = None) -> Any:
        usage = self._wgpu.BufferUsage
        flags = usage.STORAGE | usage.COPY_DST | usage.COPY_SRC
        if content is None:
            return self._device.create_buffer(size=size, usage=flags)
        return self._device.create_buffer_with_data(data=content, usage=flags)

    def _last_group(self, index: int) -> Any:
        """A uniform with the number of the last work-group along x.  It follows the buffers of every kernel."""
        if index not in self._last_groups:
            content = np.array([index, 0, 0, 0], np.uint32)
            usage = self._wgpu.BufferUsage.UNIFORM
            self._last_groups[index] = self._device.create_buffer_with_data(data=content, usage=usage)
        return self._last_groups[index]

    def prepare(self, launches: Sequence[Launch], kernels: Mapping[str, Kernel], buffers: Mapping[str, Any]) -> Any:
        prepared = []
        for launch in launches:
            pipeline = self._pipelines[launch.kernel]
            bound = [*(buffers[name] for name in launch.buffers), self._last_group(launch.grid[0] - 1)]
            entries = [
                {"binding": i, "resource": {"buffer": buffer, "offset": 0, "size": buffer.size}}
                for i, buffer in enumerate(bound)
            ]
            group = self._device.create_bind_group(layout=pipeline.get_bind_group_layout(0), entries=entries)
            prepared.append((pipeline, group, launch.grid))
        return prepared

    def run(self, prepared: Any) -> None:
        encoder = self._device.create_command_encoder()
        compute = encoder.begin_compute_pass()
        for pipeline, group, grid in prepared:
            compute.set_pipeline(pipeline)
            compute.set_bind_group(0, group)
            compute.dispatch_workgroups(*grid, 1)
        compute.end()
        self._device.queue.submit([encoder.finish()])

    def write(self, buffer: Any, content: NDArray[np.generic]) -> None:
        self._device.queue.write_buffer(buffer, 0, content)

    def read(self, buffer: Any, content: NDArray[np.generic]) -> None:
        found = self._device.queue.read_buffer(buffer, 0, content.nbytes)
        content.reshape(-1)[:] = np.frombuffer(found, content.dtype)


class Backend(DeviceBackend):
    """Runs kernels of the dialect "wgsl", see ``DeviceBackend``."""

    device_type = Device
    dialect = "wgsl"
