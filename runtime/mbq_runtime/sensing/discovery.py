"""Where sensors are looked for: one row for each kind of folder or file, by name and never by number."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from . import raspberry
from .cgroup import ControlGroup
from .clocks import ClockPolicy, GpuClock
from .host import Host, Unreadable
from .hwmon import HwmonChip, IioRails
from .load import Affinity, Memory, Pressure, ProcessorTime
from .probe import Probe
from .supply import TERMUX_COMMAND, PowerSupply, RaplDomain, TermuxBattery
from .thermal import Board, CoolingDevice, ThermalZone, ThrottleCounters


class Source(NamedTuple):
    """gives: in words; places: paths of which any will do; probe: reads one; members: pattern of the names in the
    folder when each of them is a device of its own, "" when the place itself is one."""

    gives: str
    probe: Callable[[Host, str], Probe]
    places: tuple[str, ...]
    members: str = ""


SOURCES = (
    Source("thermal zones", ThermalZone, ("/sys/class/thermal",), r"thermal_zone\d+"),
    Source("cooling devices", CoolingDevice, ("/sys/class/thermal",), r"cooling_device\d+"),
    Source("known limits of the board", Board, ("/sys/firmware/devicetree/base",)),
    Source(
        "Raspberry Pi throttle bits",
        lambda host, _: raspberry.ThrottleBits(host, raspberry.MAILBOX),
        (raspberry.MAILBOX, *raspberry.TOOLS, raspberry.DRIVER),
    ),
    Source(
        "Raspberry Pi power chip",
        lambda host, _: raspberry.PowerChip(host, raspberry.MAILBOX),
        (raspberry.MAILBOX, *raspberry.TOOLS),
    ),
    Source("throttle counters of x86", ThrottleCounters, ("/sys/devices/system/cpu",)),
    Source("hwmon chips", HwmonChip, ("/sys/class/hwmon",), r"hwmon\d+"),
    Source("Jetson rails of JetPack 4", IioRails, ("/sys/bus/iio/devices",), r"iio:device\d+"),
    Source("processor clocks", ClockPolicy, ("/sys/devices/system/cpu/cpufreq",), r"policy\d+"),
    Source("GPU", GpuClock, ("/sys/class/devfreq",), r".+"),
    Source("power supplies", PowerSupply, ("/sys/class/power_supply",), r".+"),
    Source("phone battery", TermuxBattery, (TERMUX_COMMAND,)),
    Source("RAPL energy counters", RaplDomain, ("/sys/class/powercap",), r"intel-rapl:[\d:]+"),
    Source("times of the processors", ProcessorTime, ("/proc/stat",)),
    Source("affinity", Affinity, ("/proc/self/status",)),
    Source("pressure stall information", Pressure, ("/proc/pressure",), r"cpu|memory|io"),
    Source("memory", Memory, ("/proc/meminfo",)),
    Source("control group", ControlGroup, ("/proc/self/cgroup",)),
)


def discover(host: Host, source: Source) -> list[Probe]:
    """One probe for each device there is now.  Raises Unreadable, with the reason, when there is none."""
    place = next(filter(host.exists, source.places), None)
    if place is None:
        raise Unreadable("not there")
    if not source.members:
        return [source.probe(host, place)]
    names = [name for name in host.names(place) if re.fullmatch(source.members, name)]
    if not names:
        raise Unreadable("none in this folder")
    return [source.probe(host, f"{place}/{name}") for name in names]
