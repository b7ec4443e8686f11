"""The machines that this project builds for, one row each. No other file lists targets.

``docs/extending/board.md`` says how to add one.
"""

from __future__ import annotations

from dataclasses import dataclass

from mbq_runtime.bundle.isa import Machine, this_machine
from mbq_runtime.bundle.layout import NATIVE_LAYOUT, PORTABLE_LAYOUT
from mbq_runtime.errors import UsageError

from .gpu.work_groups import WorkGroups

_GLIBC = "gnu.2.28"
"""The oldest C library that the wheels of ONNX Runtime support."""

_DOTPROD = ("asimd", "asimddp")
_AVX2 = ("avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni")


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    engine: "opencl" or "webgpu", which runs the bundle.
    work_groups: sizes of the work-groups of its kernels.
    chip: an example, for estimates only. "" if the row has no single chip.
    bandwidth_gb_s: memory bandwidth of the chip in GB/s, from its maker's product page. 0: unknown.
    rate_gflop_s: float32 rate of the chip in Gflop/s: lanes times clock times two. Reviewers derived those of Qualcomm
        and MediaTek, who publish neither number. 0: unknown.
    """

    engine: str
    work_groups: WorkGroups
    chip: str = ""
    bandwidth_gb_s: float = 0.0
    rate_gflop_s: float = 0.0

    @property
    def dialect(self) -> str:
        """The language of its kernels."""
        return {"opencl": "opencl", "webgpu": "wgsl"}[self.engine]


@dataclass(frozen=True)
class Target:
    """A machine, as the compiler and the loader of bundles see it.

    name: what ``--target`` takes.
    arch: "aarch64", "x86_64", or "any" for a target without a native library.
    cpu: LLVM's name of the core.
    features: what the board must have, in the names of /proc/cpuinfo.
    isa: a key of ``kernels.isa.ISAS``, or "" for a target without a native library.
    description: one line for ``--help``.
    llvm_features: LLVM's names of features that ``cpu`` does not imply.
    gpu: the GPU that the model runs on, or None.
    """

    name: str
    arch: str
    cpu: str
    features: tuple[str, ...]
    isa: str
    description: str
    llvm_features: tuple[str, ...] = ()
    gpu: Gpu | None = None

    def engines(self, asked: tuple[str, ...]) -> tuple[str, ...]:
        """The engines of a bundle for this target. A GPU has an engine of its own.

        Args:
            asked: the engines that the user asked for.
        """
        return (self.gpu.engine,) if self.gpu else asked

    @property
    def native(self) -> bool:
        """Whether a kernel library is built for this target."""
        return bool(self.isa)

    @property
    def layout(self) -> str:
        """How weights are stored: planes for our kernels, or operands of stock operators."""
        return NATIVE_LAYOUT if self.native or self.gpu else PORTABLE_LAYOUT

    @property
    def triple(self) -> str:
        """The linker's name of the platform, with the oldest C library that the result runs on."""
        return f"{self.arch}-linux-{_GLIBC}"

    @property
    def llvm(self) -> dict[str, object]:
        """TVM's description of the machine."""
        target: dict[str, object] = {"kind": "llvm", "mtriple": f"{self.arch}-linux-gnu", "mcpu": self.cpu}
        if self.llvm_features:
            target["mattr"] = [f"+{feature}" for feature in self.llvm_features]
        return target


# From the makers' documents, not measured. A wave has 64 or 128 items on Adreno, 16 on Mali, 32 on NVIDIA. Mali has 64
# registers per item at full occupancy, so its tile is small.
_ADRENO = WorkGroups(rows=4, splits=16, tile=8, token_threads=64, attention_threads=64)
_MALI = WorkGroups(rows=4, splits=16, tile=4, token_threads=64, attention_threads=64)
_NVIDIA = WorkGroups(rows=4, splits=16, tile=8, token_threads=128, attention_threads=64)
_ANY_GPU = WorkGroups(rows=4, splits=8, tile=4, token_threads=64, attention_threads=64)

_ROWS = (
    Target(
        "arm64", "aarch64", "generic", _DOTPROD, "neon-dotprod",
        "64-bit Arm with dot product (Armv8.2): Raspberry Pi 5, Jetson Orin, RK3588, phones since 2018", ("dotprod",),
    ),
    Target(
        "arm64-i8mm", "aarch64", "generic", (*_DOTPROD, "i8mm"), "neon-i8mm",
        "64-bit Arm with int8 matrix products (Armv8.6, Armv9): phones since 2022, Graviton 3", ("dotprod", "i8mm"),
    ),
    Target("rpi4", "aarch64", "cortex-a72", ("asimd",), "neon", "Raspberry Pi 4, 400, CM4 (no dot product)"),
    Target("rpi5", "aarch64", "cortex-a76", _DOTPROD, "neon-dotprod", "Raspberry Pi 5, 500, CM5"),
    Target("jetson-orin", "aarch64", "cortex-a78ae", _DOTPROD, "neon-dotprod", "Jetson Orin Nano, NX, AGX (CPU cores)"),
    Target("x86-64-v4", "x86_64", "x86-64-v4", _AVX512, "vnni512", "x86 with AVX-512 VNNI", ("avx512vnni",)),
    Target(
        "x86-64-v3-vnni", "x86_64", "x86-64-v3", (*_AVX2, "avx_vnni"), "avx-vnni",
        "x86 with AVX2 and AVX-VNNI: Intel since Alder Lake, AMD Zen 5", ("avxvnni",),
    ),
    Target("x86-64-v3", "x86_64", "x86-64-v3", _AVX2, "avx2", "x86 with AVX2"),
    Target(
        "android-adreno", "any", "", (), "", "phones with a Qualcomm Adreno GPU, through OpenCL",
        gpu=Gpu("opencl", _ADRENO, "Snapdragon 8 Gen 3, Adreno 750", 76.8, 2774),
    ),
    Target(
        "android-mali", "any", "", (), "", "phones with an Arm Mali or Immortalis GPU, through OpenCL",
        gpu=Gpu("opencl", _MALI, "Dimensity 9300, Immortalis-G720 MC12", 76.8, 3994),
    ),
    Target(
        "mali-rk3588", "any", "", (), "", "RK3588 boards (Orange Pi 5, Rock 5): Mali-G610, through OpenCL",
        gpu=Gpu("opencl", _MALI, "RK3588, Mali-G610 MP4, LPDDR4X-4224", 33.8, 512),
    ),
    Target(
        # JetPack has Vulkan and no OpenCL. CUDA would need its compiler on the board.
        "jetson-orin-gpu", "any", "", (), "", "the GPU of Jetson Orin Nano, NX, AGX, through WebGPU on Vulkan",
        gpu=Gpu("webgpu", _NVIDIA, "Jetson Orin Nano 8GB", 68, 1280),
    ),
    Target(
        "webgpu", "any", "", (), "", "any GPU with a driver for Vulkan, Metal or Direct3D 12, through WebGPU",
        gpu=Gpu("webgpu", _ANY_GPU),
    ),
    Target("portable", "any", "", (), "", "any machine ONNX Runtime runs on: no native library"),
)  # fmt: skip

TARGETS: dict[str, Target] = {target.name: target for target in _ROWS}

_HOST_ORDER = ("x86-64-v4", "x86-64-v3-vnni", "x86-64-v3", "arm64-i8mm", "arm64", "rpi4")
"""The targets that "host" chooses from, the fastest first."""


def best_for(machine: Machine) -> Target:
    """The fastest target that a machine can run: "portable" if it can run no native one.

    Args:
        machine: its architecture and features.
    """
    for name in _HOST_ORDER:
        target = TARGETS[name]
        if target.arch == machine.arch and machine.features.issuperset(target.features):
            return target
    return TARGETS["portable"]


def resolve(name: str) -> Target:
    """The target of that name.

    Args:
        name: a key of ``TARGETS``, or "host" for the best one for this machine.

    Raises:
        UsageError: no target has that name.
    """
    if name == "host":
        return best_for(this_machine())
    if name not in TARGETS:
        raise UsageError(f"target {name!r} is not known; choose one of: host, {', '.join(TARGETS)}")
    return TARGETS[name]
