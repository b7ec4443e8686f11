"""The machines this project builds for: one row each.

A new board is a new row; nothing else in the project lists targets.
"""

from __future__ import annotations

from dataclasses import dataclass

from mbq_runtime.bundle.isa import Machine, this_machine
from mbq_runtime.errors import UsageError

from .gpu.work_groups import Tuning

_GLIBC = "gnu.2.28"  # the oldest the pip wheels of ONNX Runtime support

_DOTPROD = ("asimd", "asimddp")
_AVX2 = ("avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni")


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.  engine: what runs the bundle there.

    For estimates alone, and 0 where there is no one chip: chip, an example; its memory bandwidth in GB/s,
    from its maker's product page; its float32 rate in Gflop/s, lanes times clock times two.  Qualcomm and
    MediaTek publish neither lanes nor clock, so those two rates are what reviewers derived.
    """

    engine: str
    tuning: Tuning
    chip: str = ""
    bandwidth_gb_s: float = 0.0
    rate_gflop_s: float = 0.0

    @property
    def dialect(self) -> str:
        """The language of its kernels."""
        return {"opencl": "opencl", "webgpu": "wgsl"}[self.engine]


@dataclass(frozen=True)
class Target:
    """What a machine is to the compiler and to the loader.

    arch: "aarch64", "x86_64" or "any"; cpu, llvm_features: LLVM's names;
    features: what the board must have, named as in /proc/cpuinfo; isa: a row of
    ``kernels.isa.ISAS``, or "" for a target that has no native library; gpu: set where the model runs on
    a GPU, whatever the processor is.
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
        """What a bundle for this target runs on where ``asked`` is: a GPU has an engine of its own."""
        return (self.gpu.engine,) if self.gpu else asked

    @property
    def native(self) -> bool:
        """Whether a kernel library is built for this target."""
        return bool(self.isa)

    @property
    def layout(self) -> str:
        """How weights are stored: "mbq16" (planes for our kernels) or "nbits" (stock operators)."""
        return "mbq16" if self.native or self.gpu else "nbits"

    @property
    def triple(self) -> str:
        """The linker's name of the platform, with the oldest C library the result runs on."""
        return f"{self.arch}-linux-{_GLIBC}"

    @property
    def llvm(self) -> dict[str, object]:
        """The kernel compiler's target description."""
        target: dict[str, object] = {"kind": "llvm", "mtriple": f"{self.arch}-linux-gnu", "mcpu": self.cpu}
        if self.llvm_features:
            target["mattr"] = [f"+{feature}" for feature in self.llvm_features]
        return target


# Tuned on paper, from what the makers say of their cores: a wave is 64 or 128 items on Adreno, 16 on Mali, 32 on
# NVIDIA's; Mali has 64 registers an item at full occupancy, hence the small tile.
_ADRENO = Tuning(rows=4, splits=16, tile=8, token_threads=64, attention_threads=64)
_MALI = Tuning(rows=4, splits=16, tile=4, token_threads=64, attention_threads=64)
_NVIDIA = Tuning(rows=4, splits=16, tile=8, token_threads=128, attention_threads=64)
_ANY_GPU = Tuning(rows=4, splits=8, tile=4, token_threads=64, attention_threads=64)

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
        # Through Vulkan, which JetPack has; it has no OpenCL, and CUDA would need its compiler on the board.
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

# What "host" may become, the best first.
_HOST_ORDER = ("x86-64-v4", "x86-64-v3-vnni", "x86-64-v3", "arm64-i8mm", "arm64", "rpi4")


def best_for(machine: Machine) -> Target:
    """The fastest target ``machine`` can run; "portable" if it can run none of the native ones."""
    for name in _HOST_ORDER:
        target = TARGETS[name]
        if target.arch == machine.arch and machine.features.issuperset(target.features):
            return target
    return TARGETS["portable"]


def resolve(name: str) -> Target:
    """The target called ``name``; "host" is the best one for this machine.

    Raises UsageError, naming the known targets.
    """
    if name == "host":
        return best_for(this_machine())
    if name not in TARGETS:
        raise UsageError(f"target {name!r} is not known; choose one of: host, {', '.join(TARGETS)}")
    return TARGETS[name]
