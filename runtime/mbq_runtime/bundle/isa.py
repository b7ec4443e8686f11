"""What this machine's processor can do, and whether a bundle may run on it.

``check`` must run before a native library is opened: an instruction that the processor lacks ends the process without
a message.  Features have the names of ``/proc/cpuinfo``.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..errors import BundleError

_AT_HWCAP, _AT_HWCAP2 = 16, 26

# Bit numbers of the arm64 Linux ABI (asm/hwcap.h).
_ARM64_FEATURES = {
    _AT_HWCAP: {
        "fp": 0, "asimd": 1, "aes": 3, "crc32": 7, "atomics": 8, "fphp": 9, "asimdhp": 10, "asimdrdm": 12,
        "asimddp": 20, "sve": 22, "asimdfhm": 23,
    },
    _AT_HWCAP2: {"sve2": 1, "svei8mm": 9, "svebf16": 12, "i8mm": 13, "bf16": 14},
}  # fmt: skip

_ARCH_NAMES = {"arm64": "aarch64", "amd64": "x86_64", "x64": "x86_64"}

AuxiliaryValue = Callable[[int], int]


@dataclass(frozen=True)
class Machine:
    """A processor.

    arch: "aarch64", "x86_64", or the system's name for another.
    features: names as in ``/proc/cpuinfo``.
    pointer_bits: of Python: 64, or 32 also where a 64-bit kernel runs a 32-bit system.
    libc: C library of Python: "glibc" or "musl".
    """

    arch: str
    features: frozenset[str]
    pointer_bits: int = 64
    libc: str = "glibc"

    @property
    def lacks(self) -> str | None:
        """What the engines miss on this system, in one line; None when nothing is missing."""
        if self.pointer_bits != 64:
            return (
                f"this Python is a {self.pointer_bits}-bit program, and the engines need 64 bits; "
                "install a 64-bit system, such as the 64-bit Raspberry Pi OS"
            )
        if self.libc != "glibc":
            return (
                f"this Python uses the C library {self.libc}, and the engines and kernels need glibc; "
                "use a container of Debian or Ubuntu"
            )
        return None

    def __str__(self) -> str:
        """The machine in words.

        >>> str(Machine("aarch64", frozenset(), 32))[:31]
        'aarch64, 32-bit Python with gli'
        """
        return f"{self.arch}, {self.pointer_bits}-bit Python with {self.libc}"


class Requirement(Protocol):
    """What a bundle needs of a machine; ``manifest.TargetFacts`` is one."""

    @property
    def name(self) -> str: ...
    @property
    def arch(self) -> str: ...
    @property
    def features(self) -> tuple[str, ...]: ...


def this_machine(
    root: Path = Path("/"), arch: str | None = None, auxiliary_value: AuxiliaryValue | None = None
) -> Machine:
    """The machine that this process runs on.

    On arm64 the features come from getauxval, which is also right in a container and under user-mode emulation.  On
    x86 they come from ``proc/cpuinfo``.

    Args:
        root: folder that holds ``proc``.
        arch: name of the architecture; None for this machine's.
        auxiliary_value: stands in for getauxval; None for the C library's.
    """
    name = (arch or platform.machine()).lower()
    name = _ARCH_NAMES.get(name, name)
    readers: dict[str, Callable[[], frozenset[str]]] = {
        "aarch64": lambda: _arm64_features(auxiliary_value or _getauxval),
        "x86_64": lambda: _cpuinfo_flags(root / "proc/cpuinfo"),
    }
    pointer_bytes = sysconfig.get_config_var("SIZEOF_VOID_P") or 8
    builds = (str(sysconfig.get_config_var(key)) for key in ("SOABI", "HOST_GNU_TYPE", "MULTIARCH"))
    libc = "musl" if any("musl" in build for build in builds) else "glibc"
    return Machine(name, readers.get(name, frozenset)(), 8 * int(pointer_bytes), libc)


def problem(target: Requirement, machine: Machine) -> str | None:
    """Why a bundle cannot run on a machine, in one line; None when it can.

    Args:
        target: what the bundle needs.
        machine: what there is.
    """
    if machine.lacks and (target.arch != "any" or machine.pointer_bits != 64):
        return machine.lacks
    if target.arch == "any":
        return None
    needs = f"{target.arch}" + (f" with {', '.join(target.features)}" if target.features else "")
    missing = [feature for feature in target.features if feature not in machine.features]
    if target.arch != machine.arch:
        seen = f"this machine is {machine.arch}"
    elif missing:
        seen = f"this {machine.arch} machine lacks {', '.join(missing)}"
    else:
        return None
    return (
        f"the bundle is for target {target.name} ({needs}), but {seen}; "
        "export it again with mbq-export --target TARGET for this machine, or --target portable for any"
    )


def check(target: Requirement, machine: Machine | None = None) -> None:
    """Refuse a bundle that cannot run on a machine.

    Args:
        target: what the bundle needs.
        machine: what there is; None for this machine.

    Raises:
        BundleError: the architecture differs, or the processor lacks a feature.
    """
    if found := problem(target, machine or this_machine()):
        raise BundleError(found)


def mount_problem(folder: Path) -> str | None:
    """Why the libraries of a bundle cannot be loaded from where it lies, in one line; None when they can.

    Args:
        folder: folder of the bundle.
    """
    try:
        flags = os.statvfs(folder).f_flag
    except OSError:
        return None
    if not flags & os.ST_NOEXEC:
        return None
    return f"{folder} lies on a noexec mount, from which no library can be loaded; copy it elsewhere"


def _getauxval(kind: int) -> int:
    library = ctypes.CDLL(None)
    library.getauxval.restype = ctypes.c_ulong
    library.getauxval.argtypes = [ctypes.c_ulong]
    return int(library.getauxval(kind))


def _arm64_features(auxiliary_value: AuxiliaryValue) -> frozenset[str]:
    return frozenset(
        name for kind, bits in _ARM64_FEATURES.items() for name, bit in bits.items() if auxiliary_value(kind) >> bit & 1
    )


def _cpuinfo_flags(path: Path) -> frozenset[str]:
    """Flags that all processors have; empty when the file cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    flags = [frozenset(value.split()) for key, _, value in (line.partition(":") for line in lines)
             if key.strip() == "flags"]  # fmt: skip
    return frozenset.intersection(*flags) if flags else frozenset()
