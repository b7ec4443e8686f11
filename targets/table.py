"""The machines this project builds for: one row each.

A new board is a new row; nothing else in the project lists targets.
"""

from __future__ import annotations

from dataclasses import dataclass

from mbq_runtime.errors import UsageError
from mbq_runtime.isa import Machine, this_machine

_GLIBC = "gnu.2.28"  # the oldest the pip wheels of ONNX Runtime support

_DOTPROD = ("asimd", "asimddp")
_AVX2 = ("avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni")


@dataclass(frozen=True)
class Target:
    """What a machine is to the compiler and to the loader.

    arch: "aarch64", "x86_64" or "any"; cpu, llvm_features: LLVM's names;
    features: what the board must have, named as in /proc/cpuinfo; isa: a row of
    ``kernels.isa.ISAS``, or "" for a target that has no native library.
    """

    name: str
    arch: str
    cpu: str
    features: tuple[str, ...]
    isa: str
    description: str
    llvm_features: tuple[str, ...] = ()

    @property
    def native(self) -> bool:
        """Whether a kernel library is built for this target."""
        return bool(self.isa)

    @property
    def layout(self) -> str:
        """How weights are stored: "mbq16" (planes for our kernels) or "nbits" (stock operators)."""
        return "mbq16" if self.native else "nbits"

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


_ROWS = (
    Target(
        "arm64", "aarch64", "generic", _DOTPROD, "neon-dotprod",
        "64-bit Arm with dot product (Armv8.2): Raspberry Pi 5, Jetson Orin, RK3588, phones since 2018", ("dotprod",),
    ),
    Target("rpi4", "aarch64", "cortex-a72", ("asimd",), "neon", "Raspberry Pi 4, 400, CM4 (no dot product)"),
    Target("rpi5", "aarch64", "cortex-a76", _DOTPROD, "neon-dotprod", "Raspberry Pi 5, 500, CM5"),
    Target("jetson-orin", "aarch64", "cortex-a78ae", _DOTPROD, "neon-dotprod", "Jetson Orin Nano, NX, AGX (CPU cores)"),
    Target("x86-64-v4", "x86_64", "x86-64-v4", _AVX512, "vnni512", "x86 with AVX-512 VNNI", ("avx512vnni",)),
    Target("x86-64-v3", "x86_64", "x86-64-v3", _AVX2, "avx2", "x86 with AVX2"),
    Target("portable", "any", "", (), "", "any machine ONNX Runtime runs on: no native library"),
)  # fmt: skip

TARGETS: dict[str, Target] = {target.name: target for target in _ROWS}

# What "host" may become, the best first.
_HOST_ORDER = ("x86-64-v4", "x86-64-v3", "arm64", "rpi4")


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
