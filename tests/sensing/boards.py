"""The boards: what their kernels show, and what is to be read of it.

Names, units and values are those the boards expose; LATER_S after the first look ``later`` takes the
place of the counters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from trees import Mailbox

from mbq_runtime.sensing import Kind

ZONES, HWMON, COOLING = (
    "/sys/class/thermal/thermal_zone",
    "/sys/class/hwmon/hwmon",
    "/sys/class/thermal/cooling_device",
)
POLICY = "/sys/devices/system/cpu/cpufreq/policy"

LATER_S = 100  # long enough for every sensor to have its turn again
Files = dict[str, str]


class Expected(NamedTuple):
    """A signal: unit and file spelled out."""

    kind: Kind
    name: str
    value: float
    unit: str
    source: str
    limit: float | None = None
    hard_limit: float | None = None


@dataclass(frozen=True, eq=False)
class Board:
    files: Files
    later: Files
    signals: tuple[Expected, ...]
    readings: Mapping[str, Any]
    unknown: tuple[str, ...] = ()  # files that have no reading on a healthy board
    missing: tuple[str, ...] = ()  # sources it lacks
    commands: Mapping[tuple[str, ...], str] = field(default_factory=dict)
    mailbox: Mailbox = field(default_factory=Mailbox)


def zone(number: int, kind: str, temp: int | str, *trips: tuple[str, int], policy: str = "step_wise") -> Files:
    folder = f"{ZONES}{number}"
    files = {
        f"{folder}/type": kind,
        f"{folder}/temp": str(temp),
        f"{folder}/policy": policy,
        f"{folder}/mode": "enabled",
    }
    for i, (trip, celsius) in enumerate(trips):
        files |= {f"{folder}/trip_point_{i}_temp": str(celsius), f"{folder}/trip_point_{i}_type": trip,
                  f"{folder}/trip_point_{i}_hyst": "0"}  # fmt: skip
    return files


def cooling(number: int, kind: str, step: int, steps: int) -> Files:
    folder = f"{COOLING}{number}"
    return {f"{folder}/type": kind, f"{folder}/cur_state": str(step), f"{folder}/max_state": str(steps)}


def clocks(first: int, cpus: str, highest: int, allowed: int, now: int) -> Files:
    folder = f"{POLICY}{first}"
    return {f"{folder}/{name}": str(value) for name, value in (
        ("related_cpus", cpus), ("affected_cpus", cpus), ("cpuinfo_max_freq", highest), ("scaling_max_freq", allowed),
        ("scaling_cur_freq", now), ("scaling_governor", "ondemand"),
    )}  # fmt: skip


def folder(path: str, **files: int | str) -> Files:
    return {f"{path}/{name}": str(value) for name, value in files.items()}


def hwmon(number: int, name: str, **files: int | str) -> Files:
    return folder(f"{HWMON}{number}", name=name, **files)


def device_tree(*compatible: str) -> Files:
    return {"/sys/firmware/devicetree/base/compatible": "".join(f"{part}\0" for part in compatible)}


def _stat(cpus: int, busy: int) -> str:
    """Per processor ``busy`` ticks, of user, nice, system, irq, softirq and steal; then idle, iowait, guest."""
    parts = [busy - 500, 100, 200, 70_000, 900, 50, 100, 50, 0, 0]
    rows = [f"cpu{i} {' '.join(map(str, parts))}" for i in range(cpus)]
    total = " ".join(str(cpus * part) for part in parts)
    return "\n".join(
        [f"cpu  {total}", *rows, "intr 5067671 0 33", "ctxt 4561561", "btime 1795510931", "processes 9021"]
    )


def _self_stat(own: int) -> str:
    return f"4711 (mbq (run)) S 1 4711 4711 0 -1 4194560 5921 0 12 0 {own - 40} 40 0 0 20 0 4 0 9021 1234567 9000"


def _pressure(total_us: int) -> str:
    return (f"some avg10=3.25 avg60=1.10 avg300=0.40 total={total_us}\n"
            f"full avg10=0.00 avg60=0.00 avg300=0.00 total={total_us // 2}")  # fmt: skip


MEMINFO = """MemTotal:        8245092 kB
MemFree:         3112344 kB
MemAvailable:    6000000 kB
Buffers:           80112 kB
SwapFree:         102396 kB
HugePages_Total:       0"""
PRESSURES = ("cpu", "memory", "io")


def linux(
    cpus: int, foreign: float, own: float, pressure: bool = True, allowed: str = "", usable: int = 0
) -> tuple[Files, Files]:
    """/proc of a machine on which others take ``foreign`` of all processors, and this program ``own`` CPUs of those
    it is ``allowed``, of which there are ``usable``."""
    every = f"0-{cpus - 1}"
    now = {
        "/proc/stat": _stat(cpus, 10_000),
        "/proc/self/stat": _self_stat(2_000),
        "/proc/self/status": f"Name:\tmbq\nCpus_allowed:\tff\nCpus_allowed_list:\t{allowed or every}\nThreads:\t4",
        "/proc/meminfo": MEMINFO,
        "/sys/devices/system/cpu/online": every,
    }
    ticks = LATER_S * 100
    later = {
        "/proc/stat": _stat(cpus, 10_000 + round((foreign + own / (usable or cpus)) * ticks)),
        "/proc/self/stat": _self_stat(2_000 + round(own * ticks)),
    }
    if pressure:
        now |= {f"/proc/pressure/{what}": _pressure(1_000_000) for what in PRESSURES}
        later |= {f"/proc/pressure/{what}": _pressure(1_000_000 + LATER_S * 200_000) for what in PRESSURES}
    return now, later


def own_group() -> Files:
    """A login session under systemd: no limit anywhere."""
    top = "/sys/fs/cgroup"
    files = {
        "/proc/self/cgroup": "0::/user.slice/user-1000.slice",
        "/proc/self/mountinfo": f"33 24 0:28 / {top} rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw",
        f"{top}/cpu.stat": "usage_usec 9\nuser_usec 5\nsystem_usec 4",
        f"{top}/cgroup.controllers": "cpuset cpu io memory pids",
    }
    for group in ("user.slice", "user.slice/user-1000.slice"):
        files |= folder(f"{top}/{group}", **{
            "cpu.max": "max 100000", "cpu.stat": "usage_usec 9\nnr_periods 0\nnr_throttled 0\nthrottled_usec 0",
            "memory.max": "max", "memory.high": "max", "memory.current": "912281600",
            "memory.stat": "inactive_file 4096",
        })  # fmt: skip
    return files


LOAD_SIGNALS = (
    Expected(Kind.OWN_LOAD, "this program", 1.5, "CPUs", "/proc/self/stat"),
    Expected(Kind.MEMORY, "available", 6_144_000_000, "bytes", "/proc/meminfo", 8245092 * 1024),
)
PRESSURE_SIGNALS = (
    Expected(Kind.CPU_PRESSURE, "cpu", 0.2, "share", "/proc/pressure/cpu"),
    Expected(Kind.MEMORY_PRESSURE, "memory", 0.2, "share", "/proc/pressure/memory"),
    Expected(Kind.IO_PRESSURE, "io", 0.2, "share", "/proc/pressure/io"),
)


def load_signals(cpus: int, foreign: float) -> tuple[Expected, ...]:
    return (
        Expected(Kind.FOREIGN_LOAD, "other programs", foreign, "share", "/proc/stat"),
        Expected(Kind.PROCESSORS, "affinity", cpus, "CPUs", "/proc/self/status"),
        *LOAD_SIGNALS,
        *PRESSURE_SIGNALS,
    )


def load_readings(cpus: float, foreign: float) -> dict[str, Any]:
    return {
        "foreign_cpu_fraction": foreign,
        "cpu_pressure": 0.2,
        "available_cpus": cpus,
        "cgroup_throttled_fraction": 0.0,
        "available_memory_bytes": 6_144_000_000,
    }
