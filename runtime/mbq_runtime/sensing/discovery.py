"""The kinds of sensors and where to find them: one row each.  Devices are found by name, never by number."""

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
from .thermal import BoardLimit, CoolingDevice, ThermalZone, ThrottleCounters


class SensorKind(NamedTuple):
    """One kind of sensor.

    name: text for people; probe: makes the reader of one device from (host, path); places: paths, of which the first
    that exists is used; members: pattern of the names in this folder that are devices, "" when the path itself is the
    device.
    """

    name: str
    probe: Callable[[Host, str], Probe]
    places: tuple[str, ...]
    members: str = ""


SENSOR_KINDS = (
    SensorKind("thermal zones", ThermalZone, ("/sys/class/thermal",), r"thermal_zone\d+"),
    SensorKind("cooling devices", CoolingDevice, ("/sys/class/thermal",), r"cooling_device\d+"),
    SensorKind("known limits of the board", BoardLimit, ("/sys/firmware/devicetree/base", "/proc/cpuinfo")),
    SensorKind(
        "Raspberry Pi throttle bits",
        lambda host, _: raspberry.ThrottleBits(host, raspberry.MAILBOX),
        (raspberry.MAILBOX, *raspberry.TOOLS, raspberry.DRIVER),
    ),
    SensorKind(
        "Raspberry Pi power chip",
        lambda host, _: raspberry.PowerChip(host, raspberry.MAILBOX),
        (raspberry.MAILBOX, *raspberry.TOOLS),
    ),
    SensorKind("throttle counters of x86", ThrottleCounters, ("/sys/devices/system/cpu",)),
    SensorKind("hwmon chips", HwmonChip, ("/sys/class/hwmon",), r"hwmon\d+"),
    SensorKind("Jetson rails of JetPack 4", IioRails, ("/sys/bus/iio/devices",), r"iio:device\d+"),
    SensorKind("processor clocks", ClockPolicy, ("/sys/devices/system/cpu/cpufreq",), r"policy\d+"),
    SensorKind("GPU", GpuClock, ("/sys/class/devfreq",), r".+"),
    SensorKind("power supplies", PowerSupply, ("/sys/class/power_supply",), r".+"),
    SensorKind("phone battery", TermuxBattery, (TERMUX_COMMAND,)),
    SensorKind("RAPL energy counters", RaplDomain, ("/sys/class/powercap",), r"intel-rapl:[\d:]+"),
    SensorKind("times of the processors", ProcessorTime, ("/proc/stat",)),
    SensorKind("affinity", Affinity, ("/proc/self/status",)),
    SensorKind("pressure stall information", Pressure, ("/proc/pressure",), r"cpu|memory|io"),
    SensorKind("memory", Memory, ("/proc/meminfo",)),
    SensorKind("control group", ControlGroup, ("/proc/self/cgroup",)),
)
"""All kinds of sensors.  ``Sensors`` looks for each of them."""


def discover(host: Host, sensor: SensorKind) -> list[Probe]:
    """The devices of one kind that are present now, one probe each.

    Args:
        host: the machine.
        sensor: the kind of sensor.

    Raises:
        Unreadable: there is no such device; the message is the reason.
    """
    place = next(filter(host.exists, sensor.places), None)
    if place is None:
        raise Unreadable("not found")
    if not sensor.members:
        return [sensor.probe(host, place)]
    names = [name for name in host.names(place) if re.fullmatch(sensor.members, name)]
    if not names:
        raise Unreadable("none in this folder")
    return [sensor.probe(host, f"{place}/{name}") for name in names]
