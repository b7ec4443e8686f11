"""Load of the processors and the memory: /proc/stat, pressure stall information, /proc/meminfo."""

from __future__ import annotations

import os
import re

from .host import Host, Unreadable
from .probe import NEEDS_SECOND_LOOK, Growth, Probe
from .signal import Kind, Signal, signal

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# Columns of a "cpu" line of /proc/stat that count work: user, nice, system, irq, softirq, steal.
_BUSY_COLUMNS = (0, 1, 2, 5, 6, 7)
_PRESSURES = {"cpu": Kind.CPU_PRESSURE, "memory": Kind.MEMORY_PRESSURE, "io": Kind.IO_PRESSURE}
_OWN = "this program"
_STATUS, _STAT, _ONLINE = "/proc/self/status", "/proc/self/stat", "/sys/devices/system/cpu/online"


class Affinity(Probe):
    """Number of processors on which this process may run."""

    kind = Kind.PROCESSORS
    shown = "affinity"

    def look(self) -> list[Signal]:
        return [signal(self.kind, self.name, len(allowed_cpus(self.host)), _STATUS)]


class ProcessorTime(Probe):
    """Load by other programs, and by other guests of the same host, on the processors this process may use.

    Args:
        host: the machine.
        path: the file with the times of the processors.
    """

    kind = Kind.FOREIGN_LOAD
    shown = "other programs"

    def __init__(self, host: Host, path: str) -> None:
        super().__init__(host, path)
        self._growth = Growth()

    def look(self) -> list[Signal]:
        cpus = allowed_cpus(self.host)
        busy_s = self._busy_s(cpus)
        own_s = self._own_s()
        grown = self._growth.since(self.host.clock(), busy_s, own_s)
        if grown is None:
            return self.unknown(NEEDS_SECOND_LOOK)
        span_s, busy_s, own_s = grown
        foreign = min(1.0, max(0.0, busy_s - own_s) / (span_s * len(cpus)))
        return [
            signal(self.kind, self.name, foreign, self.path, note=f"of {len(cpus)} CPUs"),
            signal(Kind.OWN_LOAD, _OWN, own_s / span_s, _STAT),
        ]

    def unknown(self, problem: str) -> list[Signal]:
        own = Signal(Kind.OWN_LOAD, _OWN, None, _STAT, problem=problem)
        return [*super().unknown(problem), own]

    def _busy_s(self, cpus: frozenset[int]) -> float:
        """Raises Unreadable when a processor's line is missing or short."""
        ticks, found = 0, set()
        for line in self.host.text(self.path).splitlines():
            name, *columns = line.split()
            if (number := re.fullmatch(r"cpu(\d+)", name)) and int(number[1]) in cpus:
                if len(columns) <= _BUSY_COLUMNS[-1] or not all(map(str.isdecimal, columns)):
                    raise Unreadable(f"not the times of a processor: {line[:40]!r}")
                found.add(int(number[1]))
                ticks += sum(int(columns[i]) for i in _BUSY_COLUMNS)
        if missing := sorted(cpus - found):
            raise Unreadable(f"no line of CPU {missing[0]}")
        return ticks / _TICKS_PER_S

    def _own_s(self) -> float:
        try:
            columns = self.host.text(_STAT).rpartition(")")[2].split()
            return (int(columns[11]) + int(columns[12])) / _TICKS_PER_S
        except Unreadable as error:
            raise Unreadable(f"load of this program is unknown: {_STAT}: {error}") from error
        except (IndexError, ValueError):
            raise Unreadable(f"load of this program is unknown: {_STAT}: not the times of a process") from None


class Pressure(Probe):
    """Share of time in which a task waited, from a running total.  The first look gives the kernel's 10 s average.

    Args:
        host: the machine.
        path: file of one resource.
    """

    def __init__(self, host: Host, path: str) -> None:
        super().__init__(host, path)
        self.kind = _PRESSURES.get(self.name, Kind.CHIP)
        self._growth = Growth()

    def look(self) -> list[Signal]:
        if self.kind is Kind.CHIP:
            return []
        text = self.host.text(self.path)
        found = re.match(r"some avg10=(\d+\.\d+) .*total=(\d+)$", text, re.M)
        if not found:
            raise Unreadable(f"not a pressure: {text[:40]!r}")
        grown = self._growth.since(self.host.clock(), int(found[2]) * 1e-6)
        share = float(found[1]) / 100 if grown is None else min(1.0, grown[1] / grown[0])
        note = "a task waits" if grown else "average of 10 s"
        return [signal(self.kind, self.name, share, self.path, note=note)]


class Memory(Probe):
    """Memory that is available without swapping."""

    kind = Kind.MEMORY
    shown = "available"

    def look(self) -> list[Signal]:
        text = self.host.text(self.path)
        sizes = {name: int(kb) * 1024 for name, kb in re.findall(r"^(\w+): +(\d+) kB$", text, re.M)}
        if "MemAvailable" not in sizes:
            raise Unreadable("no line MemAvailable")
        return [signal(self.kind, self.name, sizes["MemAvailable"], self.path, limit=sizes.get("MemTotal"))]


def allowed_cpus(host: Host) -> frozenset[int]:
    """Numbers of the processors that are in the affinity mask of this process and online.

    In a container of LXC the mask has the numbers of the host, and the online processors are numbered from 0.  They are
    those of the mask then.

    Args:
        host: the machine.

    Raises:
        Unreadable: the kernel does not give them.
    """
    found = re.search(r"^Cpus_allowed_list:\s*(\S+)$", host.text(_STATUS), re.M)
    if not found:
        raise Unreadable(f"{_STATUS}: no line Cpus_allowed_list")
    allowed, online = _numbers(found[1], _STATUS), _numbers(host.text(_ONLINE), _ONLINE)
    if not online:
        raise Unreadable(f"{_ONLINE}: no processor")
    # The mask of a virtual machine also has processors that can be added later.
    common = allowed & online
    renumbered = not common or (len(allowed) == len(online) and allowed != online)
    return online if renumbered else common


def _numbers(ranges: str, file: str) -> frozenset[int]:
    """The numbers in a text such as "0-3,5".  Raises Unreadable."""
    numbers: set[int] = set()
    for part in ranges.split(","):
        found = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part)
        if not found:
            raise Unreadable(f"{file}: not a set of processors: {ranges[:40]!r}")
        numbers.update(range(int(found[1]), int(found[2] or found[1]) + 1))
    return frozenset(numbers)
