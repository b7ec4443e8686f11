"""What comes before a bundle reaches an engine: the checks, and the engine's own set-up."""

from __future__ import annotations

import ctypes
import fcntl
import math
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

from mbq_runtime.bundle import isa, manifest
from mbq_runtime.bundle.manifest import OPS_LIBRARY, Manifest
from mbq_runtime.errors import BundleError, UsageError
from mbq_runtime.sensing.cgroup import cpu_limit
from mbq_runtime.sensing.host import Host, run_command


def open_bundle(folder: str | os.PathLike[str], threads: int | None) -> tuple[Path, Manifest]:
    """Everything that can be refused cheaply is refused here, before a native library is loaded.

    Raises BundleError (incomplete, too new, not for this machine) and UsageError (threads).
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads {threads}: needed a whole number above 0")
    path = Path(folder).expanduser()
    found = manifest.read(path)
    manifest.check_sizes(path, found)
    isa.check(found.target)
    return path.resolve(), found


_BIG = 0.6
"""Cores of less than this share of the strongest's capacity get no thread: a token's work is shared out, and all would
wait for them.  An A55 beside A76 has half (RK3588), an A510 beside an X3 three tenths, an A715 three quarters."""


def cores(root: Path = Path("/")) -> int:
    """Big cores this process may run on; threads that share one (SMT) count once, and a cgroup's limit is kept.

    The kernel puts threads that never rest on the cores with the most capacity, so their number is all that is said.
    Engines are always told: onnxruntime-genai 0.18 by itself takes one of two.
    """
    folders = {cpu: root / f"sys/devices/system/cpu/cpu{cpu}" for cpu in os.sched_getaffinity(0)}
    capacity = {cpu: _capacity(folder) for cpu, folder in folders.items()}
    big = [cpu for cpu in folders if capacity[cpu] >= _BIG * max(capacity.values())]
    count = len({_line(folders[cpu] / "topology/thread_siblings_list", str(cpu)) for cpu in big})
    limit_cpus = cpu_limit(Host(str(root).rstrip("/"), time.monotonic, run_command, fcntl.ioctl))
    return count if limit_cpus is None else min(count, math.ceil(limit_cpus))


def _capacity(cpu: Path) -> int:
    """Of 1024, the strongest core's; kernels say it where cores differ."""
    text = _line(cpu / "cpu_capacity", "")
    return int(text) if text.isdecimal() else 1024


def _line(path: Path, otherwise: str) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return otherwise


SHORT_SPINNING = ("session.intra_op.spin_duration_us", "10")
"""Entry of a session's configuration: threads wait for work this long before they sleep.  With 1 us SmolLM2-135M
decoded a quarter slower; with 5 us and more it did not, and less is better beside other programs, whose core a waiting
thread takes."""


def ops_threads(owner: object, path: Path, manifest: Manifest) -> ctypes.CDLL | None:
    """The bundle's operators, which can be told how many of a session's threads to use: ``mbq_set_threads``.

    owner: whoever holds the session; when it goes, threads that are asleep are woken, for the session waits for them.
    None for a portable bundle, which has none, and for one of an earlier version, whose cannot be told.
    """
    if not manifest.native:
        return None
    library = ctypes.CDLL(str(path / OPS_LIBRARY))
    if not hasattr(library, "mbq_wake_threads"):
        return None
    weakref.finalize(owner, library.mbq_wake_threads)
    return library


def import_engine(name: str) -> ModuleType:
    """Import "onnxruntime" or "onnxruntime_genai".

    Official builds of both keep a device id in the home folder and report usage over the network;
    here they do neither, unless ORT_DISABLE_TELEMETRY=0 is set.  Raises UsageError when the package
    is missing.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return import_module(name)
    except ImportError as error:
        package = name.replace("_", "-")
        raise UsageError(f"{package} cannot be imported ({error}): pip install {package}") from None


def does_not_compile(where: Path, driver: str, what: str, error: Exception) -> BundleError:
    """The error of a driver that refuses kernels, with its log on one line."""
    log = " | ".join(line.strip() for line in str(error).splitlines() if line.strip())[:2000]
    return BundleError(f"{where}: the driver of {driver} does not compile {what}: {log}")


@contextmanager
def engine_errors(what: str) -> Iterator[None]:
    """Turn what the native side throws into a BundleError of one line that starts with ``what``."""
    try:
        yield
    # ONNX Runtime's own exceptions share no base class but Exception; genai and TVM throw Python's.
    except Exception as error:
        if isinstance(error, RuntimeError) or type(error).__module__.startswith(("onnxruntime", "tvm_ffi")):
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BundleError(f"{what}: {reason}; check the files with mbq verify") from error
        raise
