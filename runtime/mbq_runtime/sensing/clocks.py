"""Clock limits of the processors, and clock and load of the GPU."""

from __future__ import annotations

import re
from contextlib import suppress

from .host import SwitchedOff, Unreadable
from .probe import Probe
from .signal import Kind, Signal, signal

_GPU_NAMES = frozenset({"gpu", "gv11b", "gp10b", "ga10b", "gb10b", "gm20b", "mali"})
_KHZ, _HZ = 1e-3, 1e-6  # to MHz


class ClockPolicy(Probe):
    """Processors that share a clock.  scaling_max_freq is the highest clock under the limits for heat and power."""

    kind = Kind.CLOCK_LIMIT

    def look(self) -> list[Signal]:
        try:
            self.name = "CPUs " + self.host.text(f"{self.path}/related_cpus").replace(" ", ",")
            highest = self.host.number(f"{self.path}/cpuinfo_max_freq") * _KHZ
        except SwitchedOff:
            return []
        return [
            self.read(Kind.CLOCK_LIMIT, self.name, "scaling_max_freq", _KHZ, limit=highest),
            self.read(Kind.CLOCK, self.name, "scaling_cur_freq", _KHZ, limit=highest),
        ]


class GpuClock(Probe):
    """Clock and load of a GPU.  Tegra gives the load in thousandths; Rockchip writes "12@300000000Hz"."""

    kind = Kind.GPU_LOAD

    def look(self) -> list[Signal]:
        if not self._is_gpu():
            return []
        highest = self.number_or_none("max_freq")
        clock = self.read(Kind.GPU_CLOCK, self.name, "cur_freq", _HZ, limit=highest and highest * _HZ)
        file = f"{self.path}/load"
        if self.host.exists(file):
            return [self._percent(file), clock]
        return [self.read(Kind.GPU_LOAD, self.name, "device/load", 1e-3), clock]

    def _percent(self, file: str) -> Signal:
        try:
            text = self.host.text(file)
        except Unreadable as error:
            return Signal(self.kind, self.name, None, file, problem=str(error))
        if not (found := re.match(r"(\d{1,3})@", text)):
            return Signal(self.kind, self.name, None, file, problem=f"not a load: {text[:40]!r}")
        return signal(self.kind, self.name, int(found[1]) / 100, file)

    def _is_gpu(self) -> bool:
        names = set(self.name.split("."))
        with suppress(Unreadable):  # the device tree can have a better name
            names.add(self.host.text(f"{self.path}/device/of_node/name"))
        return not _GPU_NAMES.isdisjoint(names)
