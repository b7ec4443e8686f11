"""Batteries and chargers of the power_supply class, the battery of a phone under Termux, and RAPL counters."""

from __future__ import annotations

import json
import re

from .host import Host, Unreadable
from .probe import NEEDS_SECOND_LOOK, Growth, Probe
from .signal import Kind, Signal, signal

_BATTERIES, _CHARGERS = frozenset({"Battery", "UPS"}), frozenset({"Mains", "USB", "Wireless", "BrickID"})
_DISCHARGING = {"Discharging": 1.0, "Charging": 0.0, "Not charging": 0.0, "Full": 0.0}
_MICRO = 1e-6
# Names that drivers give to batteries of game controllers, mice, pens and headsets.  Many contain a Bluetooth address.
_PERIPHERAL = re.compile(
    r"hid|controller|gamepad|xpad|joy|wii|mouse|keyboard|wacom|stylus|headset|([0-9a-f]{2}[:_-]){5}[0-9a-f]{2}",
    re.I,
)
_PERIPHERAL_DEVICE = re.compile(r"/[0-9A-F]{4}:[0-9A-F]{4}:[0-9A-F]{4}\.[0-9A-F]{4}/|/bluetooth/|/uhid/|/input\d")
_MAIN_NAME = re.compile(r"BAT\w{0,2}|CMB\d|battery|main.*", re.I)
_MEASURES = ("energy_now", "charge_now", "voltage_now", "current_now", "power_now")

TERMUX_COMMAND = "/data/data/com.termux/files/usr/bin/termux-battery-status"
_TERMUX_DISCHARGING = {"DISCHARGING": 1.0, "CHARGING": 0.0, "NOT_CHARGING": 0.0, "FULL": 0.0}
_TERMUX_TIMEOUT_S, _TERMUX_FAILURES = 10.0, 3


class PowerSupply(Probe):
    """A battery or a charger of the power_supply class."""

    kind = Kind.BATTERY

    def look(self) -> list[Signal]:
        kind = self.host.text(f"{self.path}/type")
        if kind in _CHARGERS:
            self.kind = Kind.MAINS
            found = self.read(Kind.MAINS, self.name, "online")
            # 2 is a charger whose voltage can be programmed.
            return [signal(Kind.MAINS, self.name, 1, found.source) if self.number_or_none("online") == 2 else found]
        if kind not in _BATTERIES or self._says("present") == "0" or self._is_peripheral():
            return []
        power = self._power()
        discharging = self._discharging(power)
        # Some drivers give 0 when they do not measure.  Only a battery that is known to be at rest has 0 W.
        if power.value == 0 and discharging.note not in ("Charging", "Not charging", "Full"):
            at = "while discharging" if discharging.value else "with an unknown status"
            power = Signal(Kind.BATTERY_POWER, self.name, None, power.source, problem=f"0 W {at}")
        return [discharging, *self._charge(), power]

    def _is_peripheral(self) -> bool:
        """Whether this battery is that of another device, such as a game controller.

        ``scope`` says it.  Drivers that do not give it are known by the device, the name, or a lack of measurements
        beside a battery that has them.
        """
        if scope := self._says("scope"):
            return scope == "Device"
        if _MAIN_NAME.fullmatch(self.name):
            return False
        if _PERIPHERAL_DEVICE.search(self.host.device(self.path)) or _PERIPHERAL.search(self.name):
            return True
        return not _measures(self.host, self.path) and self._has_main_beside()

    def _has_main_beside(self) -> bool:
        folder = self.path.rpartition("/")[0]
        others = [f"{folder}/{name}" for name in self.host.names(folder) if name != self.name]
        return any(_measures(self.host, path) or _MAIN_NAME.fullmatch(path.rpartition("/")[2]) for path in others)

    def _says(self, file: str) -> str:
        try:
            return self.host.text(f"{self.path}/{file}")
        except Unreadable:
            return ""

    def _discharging(self, power: Signal) -> Signal:
        source = f"{self.path}/status"
        try:
            status = self.host.text(source)
        except Unreadable as error:
            return Signal(Kind.DISCHARGING, self.name, None, source, problem=str(error))
        if status == "Unknown" and power.value == 0:
            return signal(Kind.DISCHARGING, self.name, 0.0, source, note="Unknown, and no current flows")
        if status not in _DISCHARGING:
            return Signal(Kind.DISCHARGING, self.name, None, source, problem=f"status {status[:40]!r}")
        return signal(Kind.DISCHARGING, self.name, _DISCHARGING[status], source, note=status)

    def _charge(self) -> list[Signal]:
        """Charge as a share, and in Wh.  Drivers count in micro-Wh, in micro-Ah, or only in percent."""
        for now, full, volts in (("energy_now", "energy_full", 1.0), ("charge_now", "charge_full", None)):
            if not self.host.exists(f"{self.path}/{now}"):
                continue
            source = f"{self.path}/{now}"
            try:
                left, whole = self.host.number(source), self.host.number(f"{self.path}/{full}")
                factor = _MICRO * (volts or self.host.number(f"{self.path}/voltage_now") * _MICRO)
                if whole <= 0 or not 0 <= left <= 1.1 * whole:
                    raise Unreadable(f"{left} of {whole} is not plausible")
            except Unreadable as error:
                energy = Signal(Kind.BATTERY_ENERGY, self.name, None, source, problem=str(error))
                share = Signal(Kind.BATTERY, self.name, None, source, problem=str(error))
                if self.host.exists(f"{self.path}/capacity"):
                    share = self.read(Kind.BATTERY, self.name, "capacity", 0.01)
                return [share, energy]
            return [
                signal(Kind.BATTERY, self.name, min(1.0, left / whole), source),
                signal(Kind.BATTERY_ENERGY, self.name, left * factor, source, limit=whole * factor),
            ]
        share = self.read(Kind.BATTERY, self.name, "capacity", 0.01)
        return [share, Signal(Kind.BATTERY_ENERGY, self.name, None, share.source, problem="it counts in percent only")]

    def _power(self) -> Signal:
        found = self.read(Kind.BATTERY_POWER, self.name, "power_now", _MICRO)
        if not self.host.exists(f"{self.path}/power_now"):
            try:
                # The sign of the current differs between drivers; the status gives the direction.
                microamps = abs(self.host.number(f"{self.path}/current_now"))
                watts = microamps * self.host.number(f"{self.path}/voltage_now") * _MICRO * _MICRO
                source = f"{self.path}/current_now"
                found = signal(Kind.BATTERY_POWER, self.name, watts, source, note="times voltage_now")
            except Unreadable as error:
                return Signal(Kind.BATTERY_POWER, self.name, None, found.source, problem=f"not measured: {error}")
        return found


def _measures(host: Host, path: str) -> bool:
    """Whether a power supply is a battery that measures more than its percentage."""
    return any(host.exists(f"{path}/{file}") for file in _MEASURES)


class TermuxBattery(Probe):
    """The battery of a phone, by a command of Termux.

    The command takes seconds and sometimes never returns.  It is called rarely, and no longer after some failures.

    Args:
        host: the machine.
        path: the command.
    """

    kind = Kind.BATTERY
    every_s = 30.0
    shown = "phone"

    def __init__(self, host: Host, path: str) -> None:
        super().__init__(host, path)
        self._failures = 0

    def look(self) -> list[Signal]:
        if self._failures >= _TERMUX_FAILURES:
            raise Unreadable(f"not called again after {self._failures} failures")
        try:
            answer = json.loads(self.host.run([self.path], _TERMUX_TIMEOUT_S))
            percent, status = float(answer["percentage"]), answer["status"]
        except (Unreadable, ValueError, TypeError, KeyError, RecursionError) as error:
            self._failures += 1
            raise Unreadable(
                str(error) if isinstance(error, Unreadable) else "its answer is not a battery status"
            ) from error
        self._failures = 0
        found = [signal(Kind.BATTERY, self.name, percent / 100, self.path)]
        if isinstance(celsius := answer.get("temperature"), int | float):
            found.append(signal(Kind.TEMPERATURE, "phone battery", celsius, self.path))
        if status not in _TERMUX_DISCHARGING:
            return [*found, Signal(Kind.DISCHARGING, self.name, None, self.path, problem=f"status {status!r:.40}")]
        return [*found, signal(Kind.DISCHARGING, self.name, _TERMUX_DISCHARGING[status], self.path, note=status)]


class RaplDomain(Probe):
    """Power of a part of an x86 processor, from a counter in micro-J.  With most kernels only root can read it.

    Args:
        host: the machine.
        path: folder of the counter.
    """

    kind = Kind.PROCESSOR_POWER

    def __init__(self, host: Host, path: str) -> None:
        super().__init__(host, path)
        self._growth = Growth()

    def look(self) -> list[Signal]:
        self.name = self.host.text(f"{self.path}/name")
        source = f"{self.path}/energy_uj"
        try:
            energy_uj = self.host.number(source)
            wraps_at = self.host.number(f"{self.path}/max_energy_range_uj")
            if not 0 <= energy_uj <= wraps_at:
                raise Unreadable(f"{energy_uj} micro-J is not plausible")
        except Unreadable as error:
            return [Signal(self.kind, self.name, None, source, problem=str(error))]
        grown = self._growth.since(self.host.clock(), energy_uj, wraps_at=wraps_at)
        if grown is None:
            return [Signal(self.kind, self.name, None, source, problem=NEEDS_SECOND_LOOK)]
        return [signal(self.kind, self.name, grown[1] * _MICRO / grown[0], source)]
