"""Batteries and chargers of the power_supply class, the battery of a phone under Termux, and RAPL counters."""

from __future__ import annotations

import json

from .host import Host, Unreadable
from .probe import NEEDS_SECOND_LOOK, Growth, Probe
from .signal import Kind, Signal, signal

_BATTERIES, _CHARGERS = frozenset({"Battery", "UPS"}), frozenset({"Mains", "USB", "Wireless", "BrickID"})
_DISCHARGING = {"Discharging": 1.0, "Charging": 0.0, "Not charging": 0.0, "Full": 0.0}
_MICRO = 1e-6

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
        if kind not in _BATTERIES or self._says("scope") == "Device" or self._says("present") == "0":
            return []
        discharging = self._discharging()
        return [discharging, *self._charge(), self._power(bool(discharging.value))]

    def _says(self, file: str) -> str:
        try:
            return self.host.text(f"{self.path}/{file}")
        except Unreadable:
            return ""

    def _discharging(self) -> Signal:
        source = f"{self.path}/status"
        try:
            status = self.host.text(source)
        except Unreadable as error:
            return Signal(Kind.DISCHARGING, self.name, None, source, problem=str(error))
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
                return [Signal(kind, self.name, None, source, problem=str(error))
                        for kind in (Kind.BATTERY, Kind.BATTERY_ENERGY)]  # fmt: skip
            return [
                signal(Kind.BATTERY, self.name, min(1.0, left / whole), source),
                signal(Kind.BATTERY_ENERGY, self.name, left * factor, source, limit=whole * factor),
            ]
        share = self.read(Kind.BATTERY, self.name, "capacity", 0.01)
        return [share, Signal(Kind.BATTERY_ENERGY, self.name, None, share.source, problem="it counts in percent only")]

    def _power(self, discharging: bool) -> Signal:
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
        if discharging and found.value == 0:
            return Signal(Kind.BATTERY_POWER, self.name, None, found.source, problem="0 W while discharging")
        return found


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
