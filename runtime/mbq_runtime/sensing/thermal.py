"""Heat: thermal zones with their trip points, cooling devices, throttle counters, known limits of boards."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from .host import Absent, Host, NotFitted, Unreadable
from .probe import NEEDS_SECOND_LOOK, Growth, Probe
from .signal import Kind, Signal, signal

# Zones that are not used: constants (the PMIC of Tegra X1 always gives 100 C, INT3400 20 C) and other devices.
_OTHER_ZONES = re.compile(
    r"PMIC-Die|INT3400.*|iwlwifi.*|ath1.*|mt7.*|nvme.*|pch_.*|.*batt.*|.*modem.*|.*charger.*", re.I
)
# Devices that cool by slowing a processor: ACPI, cpufreq, devfreq, idle injection, hardware throttles of Tegra.
_SLOWING = re.compile(
    r"Processor|intel_powerclamp|(thermal-)?(cpufreq|devfreq|idle)-.*|.*-throttle-alert|.*-balanced", re.I
)
_TRIP_C = (30, 150)
_SELDOM_S = 60.0

# The firmware of these boards slows the processor at temperatures that no file gives.
_KNOWN_LIMITS_C = {
    "brcm,bcm2835": 80.0,
    "brcm,bcm2836": 80.0,
    "brcm,bcm2837": 80.0,
    "brcm,bcm2711": 80.0,
    "brcm,bcm2712": 80.0,
    "raspberrypi,3-model-b-plus": 60.0,
}
# The same boards by the line Model of /proc/cpuinfo, the first row that fits.  Containers hide the device tree.
_KNOWN_MODELS_C = (
    (re.compile(r"Raspberry Pi 3 Model (A|B) Plus", re.I), 60.0),
    (re.compile(r"Raspberry Pi\b"), 80.0),
)
_DEVICE_TREE, _CPUINFO = "/sys/firmware/devicetree/base/compatible", "/proc/cpuinfo"


@dataclass(frozen=True)
class _Trips:
    throttle_c: float | None
    critical_c: float | None
    note: str


class ThermalZone(Probe):
    """A thermal zone with its limits.

    Args:
        host: the machine.
        path: folder of the zone.
    """

    kind = Kind.HEAT

    def __init__(self, host: Host, path: str) -> None:
        super().__init__(host, path)
        self._trips: _Trips | None = None

    def look(self) -> list[Signal]:
        if self._trips is None:
            self.name = self._type()
            self.kind = Kind.TEMPERATURE if _OTHER_ZONES.fullmatch(self.name) else Kind.HEAT
            self._trips = self._read_trips()
        trips = self._trips
        found = self.read(
            self.kind, self.name, "temp", 1e-3, limit=trips.throttle_c, hard_limit=trips.critical_c, note=trips.note
        )
        if found.value is None and not self.host.exists(f"{self.path}/temp"):
            self._trips = None  # a driver that is loaded again can have other limits
        return [found]

    def _type(self) -> str:
        try:
            return self.host.text(f"{self.path}/type")
        except Unreadable as error:
            raise Unreadable(f"what it measures is not known: type: {error}") from error

    def _read_trips(self) -> _Trips:
        """The limits in C.  With the power_allocator governor the highest passive trip is the one it holds."""
        points: dict[str, list[float]] = {}
        troubles = []
        for file in self.host.names(self.path):
            if not re.fullmatch(r"trip_point_\d+_temp", file):
                continue
            try:
                kind = self.host.text(f"{self.path}/{file.removesuffix('temp')}type")
                celsius = self.host.number(f"{self.path}/{file}") / 1000
            except Unreadable as error:
                troubles.append(f"{file}: {error}")
                continue
            if _TRIP_C[0] <= celsius <= _TRIP_C[1]:  # drivers give 0, -274 or 2**31 for a missing trip
                points.setdefault(kind, []).append(celsius)
        passive = points.get("passive", [])
        critical = points.get("critical") or points.get("hot", [])
        held = max if len(passive) > 1 and self._policy() == "power_allocator" else min
        return _Trips(held(passive, default=None), min(critical, default=None), "; ".join(troubles))

    def _policy(self) -> str:
        try:
            return self.host.text(f"{self.path}/policy")
        except Unreadable:
            return ""


class CoolingDevice(Probe):
    """A device that cools: a fan, or a limit that slows a processor."""

    kind = Kind.COOLING

    def look(self) -> list[Signal]:
        self.name = self.host.text(f"{self.path}/type")
        self.kind = Kind.SLOWED if _SLOWING.fullmatch(self.name) else Kind.COOLING
        steps = self.number_or_none("max_state")
        found = self.read(self.kind, self.name, "cur_state", limit=steps)
        if found.value is not None and steps is not None and found.value > steps:
            return [replace(found, value=None, problem=f"step {found.value:g} of {steps} is not plausible")]
        return [found]


class ThrottleCounters(Probe):
    """How often the heat protection of an x86 processor slowed it.

    Args:
        host: the machine.
        path: folder of the processors.
    """

    kind = Kind.THROTTLE_EVENTS
    shown = "throttle counters of x86"

    def __init__(self, host: Host, path: str) -> None:
        super().__init__(host, path)
        self._files: list[str] = []
        self._growth = Growth()

    def look(self) -> list[Signal]:
        if not self._files:
            files = [f"{self.path}/{name}/thermal_throttle/package_throttle_count"
                     for name in self.host.names(self.path) if re.fullmatch(r"cpu\d+", name)]  # fmt: skip
            self._files = [file for file in files if self.host.exists(file)]
            if not self._files:
                self.every_s = _SELDOM_S
                raise NotFitted("no processor has a counter")
        counts = []
        for file in self._files:
            try:
                counts.append(float(self.host.number(file)))
            except Absent:
                self._files = []  # a processor went offline
                break
        grown = self._growth.since(self.host.clock(), *counts)
        source = f"{self.path}/cpu*/thermal_throttle/package_throttle_count"
        if grown is None:
            return [Signal(self.kind, self.name, None, source, problem=NEEDS_SECOND_LOOK)]
        return [signal(self.kind, self.name, max(grown[1:]), source, note="since the last look")]


class BoardLimit(Probe):
    """The temperature from which the firmware of this board is known to slow it."""

    kind = Kind.HEAT_LIMIT
    every_s = _SELDOM_S
    shown = "known limit of the board"

    def look(self) -> list[Signal]:
        try:
            compatible = self.host.text(_DEVICE_TREE).split("\0")
        except Absent:
            return [self._by_model()]
        limits = [(celsius, part) for part, celsius in _KNOWN_LIMITS_C.items() if part in compatible]
        if not limits:
            raise NotFitted("no limit is known for this board")
        celsius, part = min(limits)
        return [self._known(celsius, part, _DEVICE_TREE)]

    def _by_model(self) -> Signal:
        """The limit of the board that /proc/cpuinfo names.  Raises Unreadable."""
        model = re.search(r"^Model\s*: *(.+)$", self.host.text(_CPUINFO), re.M)
        for form, celsius in _KNOWN_MODELS_C:
            if model and form.match(model[1]):
                return self._known(celsius, model[1], _CPUINFO)
        raise NotFitted("no limit is known for this board")

    def _known(self, celsius: float, board: str, source: str) -> Signal:
        note = f"known for every {board}, not read from this board"
        return signal(self.kind, "firmware slows from", celsius, source, note=note)
