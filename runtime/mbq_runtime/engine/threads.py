"""How many processor threads an engine uses, and how they wait for work."""

from __future__ import annotations

import ctypes
import fcntl
import math
import os
import re
import time
import weakref
from pathlib import Path

from mbq_runtime.sensing.cgroup import cpu_limit
from mbq_runtime.sensing.host import Host, run_command

_BIG_CORE = 0.6
"""Share of the strongest core's capacity from which a core gets a thread.

All threads wait for the slowest one.  An A55 beside A76 has half (RK3588), an A510 beside an X3 three tenths, an A715
three quarters."""

_BIG_CLOCK = 0.85
"""Share of the highest clock from which a core gets a thread, where the kernel gives no capacities."""

_LITTLE_PARTS = frozenset({0xD03, 0xD04, 0xD05, 0xD46, 0xD80})
"""Numbers of the cores Cortex-A53, A35, A55, A510 and A520.  At the same clock they do half of a big core's work."""

SHORT_SPINNING = ("session.intra_op.spin_duration_us", "10")
"""Key and value of a session's configuration: a thread waits for work this long, in microseconds, before it sleeps.

A waiting thread takes a core from other programs.  Measurements are in docs/log.md."""


def cores(root: Path = Path("/")) -> int:
    """The number of big cores that this process may use.

    Threads that share a core (SMT) count once.  A cgroup's processor limit is kept.  Only the thread count is set:
    Linux already places busy threads on the big cores.  Engines always get a number, because onnxruntime-genai 0.18
    by itself takes one core of two.

    Args:
        root: folder that holds ``sys`` and ``proc``.
    """
    folders = {cpu: root / f"sys/devices/system/cpu/cpu{cpu}" for cpu in os.sched_getaffinity(0)}
    strength, share = _strengths(root, folders)
    big = [cpu for cpu in folders if strength[cpu] >= share * max(strength.values())]
    count = len({_line(folders[cpu] / "topology/thread_siblings_list", str(cpu)) for cpu in big})
    limit_cpus = cpu_limit(Host(str(root).rstrip("/"), time.monotonic, run_command, fcntl.ioctl))
    return count if limit_cpus is None else min(count, math.ceil(limit_cpus))


def _strengths(root: Path, folders: dict[int, Path]) -> tuple[dict[int, float], float]:
    """(strength of each core, share of the highest strength that makes a big core).

    The kernel gives capacities only where cores differ, and not every kernel gives them.  Then clocks and the kinds of
    the cores stand for them.  A core without a clock has the highest one.
    """
    capacities = {cpu: _number(folder / "cpu_capacity") for cpu, folder in folders.items()}
    if all(capacities.values()):
        return capacities, _BIG_CORE
    clocks = {cpu: _number(folder / "cpufreq/cpuinfo_max_freq") for cpu, folder in folders.items()}
    highest = max(clocks.values()) or 1.0
    parts = _parts(root / "proc/cpuinfo")
    strengths = {cpu: (clock or highest) * (0.5 if parts.get(cpu) in _LITTLE_PARTS else 1.0)
                 for cpu, clock in clocks.items()}  # fmt: skip
    return strengths, _BIG_CORE if parts.keys() >= folders.keys() else _BIG_CLOCK


def _parts(cpuinfo: Path) -> dict[int, int]:
    """The part number of each Arm core."""
    found, cpu = {}, -1
    for line in _line(cpuinfo, "").splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "processor" and value.isdecimal():
            cpu = int(value)
        elif key == "CPU part" and re.fullmatch("0x[0-9a-f]{3}", value):
            found[cpu] = int(value, 16)
    return found


def _number(path: Path) -> float:
    text = _line(path, "")
    return float(text) if text.isdecimal() else 0.0


def _line(path: Path, otherwise: str) -> str:
    try:
        return path.read_text("utf-8", errors="replace").strip()
    except OSError:
        return otherwise


def ops_threads(owner: object, path: Path | None) -> ctypes.CDLL | None:
    """The bundle's operator library, whose ``mbq_set_threads(count)`` bounds the threads a session uses.

    Args:
        owner: the object that holds the session.  When it is freed, sleeping threads are woken: the session waits
            for them.
        path: the library that the session loaded, or None.

    Returns:
        None for a portable bundle, and for a library of an earlier version that has no such function.
    """
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    if not hasattr(library, "mbq_wake_threads"):
        return None
    weakref.finalize(owner, library.mbq_wake_threads)
    return library
