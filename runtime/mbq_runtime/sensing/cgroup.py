"""Limits on processors and memory from the control groups of this process, from its own group to the root."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import NamedTuple

from .host import Absent, Host, Unreadable, whole_number
from .probe import NEEDS_SECOND_LOOK, Growth, Probe
from .signal import Kind, Signal, signal

_MEMBERSHIP, _MOUNTS = "/proc/self/cgroup", "/proc/self/mountinfo"
_UNLIMITED_BYTES = 2**46  # no machine has more; version 1 writes the largest number for "no limit"


class _MemoryFiles(NamedTuple):
    limits: tuple[str, ...]
    used: str
    cache: str  # the line of memory.stat that counts memory which the kernel can free at once


_MEMORY_FILES = {
    1: _MemoryFiles(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
    2: _MemoryFiles(("memory.max", "memory.high"), "memory.current", "inactive_file"),
}


def cpu_limit(host: Host) -> float | None:
    """The processor limit of this process, in processors; None when there is no limit, or it cannot be read.

    Args:
        host: the machine.
    """
    try:
        found = ControlGroup(host, _MEMBERSHIP).look()
    except Unreadable:
        return None
    return min((one.value for one in found if one.kind is Kind.PROCESSORS and one.value is not None), default=None)


class ControlGroup(Probe):
    """The control groups of this process.

    Args:
        host: the machine.
        path: the file that names the groups.
    """

    kind = Kind.PROCESSORS
    also = (Kind.MEMORY, Kind.GROUP_THROTTLING)
    shown = "control group"

    def __init__(self, host: Host, path: str) -> None:
        super().__init__(host, path)
        self._growth: defaultdict[str, Growth] = defaultdict(Growth)
        self._membership = ""
        self._known: dict[str, tuple[int, list[str]]] = {}

    def look(self) -> list[Signal]:
        if (membership := self.host.text(_MEMBERSHIP)) != self._membership:
            self._known = {controller: self._folders(membership, controller) for controller in ("cpu", "memory")}
            self._membership = membership
        found: list[Signal] = []
        seen: list[str] = []
        for controller, read in (("cpu", self._processors), ("memory", self._memory)):
            version, folders = self._known[controller]
            seen += folders
            for folder in folders:
                found += read(version, folder)
        if not seen:
            raise Unreadable("its groups are not mounted where this program can see them")
        if not any(one.kind in (Kind.GROUP_THROTTLING, Kind.PROCESSORS) for one in found):
            found.append(signal(Kind.GROUP_THROTTLING, self.name, 0, self.path, note="no processor limit"))
        return found

    def _folders(self, membership: str, controller: str) -> tuple[int, list[str]]:
        """(version, folders): the folder of this process's group first, then the visible folders above it."""
        paths: dict[int, str] = {}
        for line in membership.splitlines():
            if not (group := re.fullmatch(r"\d+:([^:]*):(/.*)", line)):
                raise Unreadable(f"not a group: {line[:40]!r}")
            controllers, path = group.groups()
            if controller in controllers.split(","):
                paths[1] = path
            elif not controllers:
                paths[2] = path
        version = min(paths, default=2)  # a controller that version 1 holds is not in version 2
        if version not in paths or not (mount := self._mount(version, controller)):
            return version, []
        top, point = mount
        inside = paths[version].removeprefix(top.rstrip("/")).strip("/")
        folder = f"{point}/{inside}".rstrip("/")
        # Inside a container the path of its own group can be invisible.  Then the mount point is the group.
        if ".." in inside or not self.host.exists(folder):
            return version, [point]
        above = [folder[:i] for i, letter in enumerate(folder) if letter == "/" and i >= len(point)]
        return version, [folder, *reversed(above)]

    def _mount(self, version: int, controller: str) -> tuple[str, str] | None:
        """(group at the top of the mount, mount point); None when there is no mount."""
        for line in self.host.text(_MOUNTS).splitlines():
            left, _, right = line.partition(" - ")
            kind, _, options = [*right.split(" ", 2), "", ""][:3]
            if kind == "cgroup2" if version == 2 else kind == "cgroup" and controller in options.split(","):
                _, _, _, top, point, *_ = [*left.split(), *[""] * 5]
                return top, point
        return None

    def _processors(self, version: int, folder: str) -> list[Signal]:
        file = f"{folder}/cpu.max" if version == 2 else f"{folder}/cpu.cfs_quota_us"
        try:
            cpus = self._quota(version, folder)
        except Unreadable as error:
            # Root groups and kernels without quotas do not have the file, and do not count periods.
            if isinstance(error, Absent) and not self._periods(folder):
                return []
            return [Signal(Kind.PROCESSORS, self.name, None, file, problem=str(error))]
        return [] if cpus is None else [signal(Kind.PROCESSORS, self.name, cpus, file), self._throttling(folder)]

    def _quota(self, version: int, folder: str) -> float | None:
        """The limit in processors; None: no limit.  Raises Unreadable."""
        if version == 1:
            quota_us = self.host.number(f"{folder}/cpu.cfs_quota_us")
            return None if quota_us == -1 else quota_us / (self.host.number(f"{folder}/cpu.cfs_period_us") or 1)
        words = self.host.text(f"{folder}/cpu.max").split()
        if len(words) != 2:
            raise Unreadable(f"not a quota and a period: {' '.join(words)[:40]!r}")
        return None if words[0] == "max" else whole_number(words[0]) / (whole_number(words[1]) or 1)

    def _periods(self, folder: str) -> tuple[int, int] | None:
        """(number of periods, number of throttled periods); None when they are not counted."""
        try:
            text = self.host.text(f"{folder}/cpu.stat")
        except Unreadable:
            return None
        counts = dict(re.findall(r"^(nr_periods|nr_throttled) (\d{1,20})$", text, re.M))
        return (int(counts["nr_periods"]), int(counts["nr_throttled"])) if len(counts) == 2 else None

    def _throttling(self, folder: str) -> Signal:
        source = f"{folder}/cpu.stat"
        if not (periods := self._periods(folder)):
            return Signal(Kind.GROUP_THROTTLING, self.name, None, source, problem="no counts of periods")
        if not (grown := self._growth[folder].since(self.host.clock(), *periods)):
            return Signal(Kind.GROUP_THROTTLING, self.name, None, source, problem=NEEDS_SECOND_LOOK)
        _, periods_grown, throttled = grown
        return signal(Kind.GROUP_THROTTLING, self.name, min(1.0, throttled / (periods_grown or 1)), source)

    def _memory(self, version: int, folder: str) -> list[Signal]:
        files = _MEMORY_FILES[version]
        if not self.host.exists(f"{folder}/{files.used}"):
            return []  # a root group, or one without this controller
        file = f"{folder}/{files.limits[0]}"
        try:
            limits = {one: self._limit_bytes(f"{folder}/{one}") for one in files.limits}
            file = f"{folder}/{min(limits, key=limits.__getitem__)}"
            if (limit := min(limits.values())) >= _UNLIMITED_BYTES:
                return []
            used = self.host.number(f"{folder}/{files.used}") - self._cache_bytes(folder, files.cache)
        except Unreadable as error:
            return [Signal(Kind.MEMORY, self.name, None, file, problem=str(error))]
        return [signal(Kind.MEMORY, self.name, max(0, limit - used), file, limit=limit)]

    def _limit_bytes(self, file: str) -> int:
        text = self.host.text(file)
        limit = _UNLIMITED_BYTES if text == "max" else whole_number(text)
        if not 0 <= limit < 2**63:
            raise Unreadable(f"{limit} bytes is not plausible")
        return limit

    def _cache_bytes(self, folder: str, line: str) -> int:
        found = re.search(rf"^{line} (\d{{1,20}})$", self.host.text(f"{folder}/memory.stat"), re.M)
        if not found:
            raise Unreadable(f"memory.stat: no line {line}")
        return int(found[1])
