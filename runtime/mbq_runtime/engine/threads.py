"""How many processor threads an engine uses, and how they wait for work."""

from __future__ import annotations

import ctypes
import fcntl
import math
import os
import time
import weakref
from pathlib import Path

from mbq_runtime.bundle.manifest import OPS_LIBRARY, Manifest
from mbq_runtime.sensing.cgroup import cpu_limit
from mbq_runtime.sensing.host import Host, run_command

_BIG_CORE = 0.6
"""Share of the strongest core's capacity from which a core gets a thread.

All threads wait for the slowest one.  An A55 beside A76 has half (RK3588), an A510 beside an X3 three tenths, an A715
three quarters."""

_FULL_CAPACITY = 1024

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
    capacity = {cpu: _capacity(folder) for cpu, folder in folders.items()}
    big = [cpu for cpu in folders if capacity[cpu] >= _BIG_CORE * max(capacity.values())]
    count = len({_line(folders[cpu] / "topology/thread_siblings_list", str(cpu)) for cpu in big})
    limit_cpus = cpu_limit(Host(str(root).rstrip("/"), time.monotonic, run_command, fcntl.ioctl))
    return count if limit_cpus is None else min(count, math.ceil(limit_cpus))


def _capacity(folder: Path) -> int:
    """Capacity of a core.  The kernel gives it only where cores differ."""
    text = _line(folder / "cpu_capacity", "")
    return int(text) if text.isdecimal() else _FULL_CAPACITY


def _line(path: Path, otherwise: str) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return otherwise


def ops_threads(owner: object, path: Path, manifest: Manifest) -> ctypes.CDLL | None:
    """The bundle's operator library, whose ``mbq_set_threads(count)`` bounds the threads a session uses.

    Args:
        owner: the object that holds the session.  When it is freed, sleeping threads are woken: the session waits
            for them.
        path: folder of the bundle.
        manifest: the bundle's manifest.

    Returns:
        None for a portable bundle, and for a library of an earlier version that has no such function.
    """
    if not manifest.native:
        return None
    library = ctypes.CDLL(str(path / OPS_LIBRARY))
    if not hasattr(library, "mbq_wake_threads"):
        return None
    weakref.finalize(owner, library.mbq_wake_threads)
    return library
