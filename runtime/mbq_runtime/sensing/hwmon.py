"""Chips of the hwmon class (temperatures, power rails, supply alarms, fans), and the rails of old Jetsons."""

from __future__ import annotations

import re

from .host import Absent, Host, Unreadable
from .probe import Probe
from .signal import Kind, Signal, signal

# Chips that a controller uses.  The others (disks, radios, fans) are only shown.
_KINDS = {
    **dict.fromkeys(("coretemp", "k10temp", "zenpower", "cpu_thermal", "soc_thermal"), Kind.HEAT),
    **dict.fromkeys(("ina219", "ina220", "ina226", "ina230", "ina231", "ina238", "ina260", "ina3221"), Kind.POWER),
    "rpi_volt": Kind.SUPPLY_ALARM,
}
# Intel processors slow themselves at the temperature that the chip calls critical.
_THROTTLES_AT_CRITICAL = frozenset({"coretemp"})
# Channels that are not rails: unconnected ones, and the sum that the chip computes for its alarm.
_NOT_RAILS = frozenset({"NC", "sum of shunt voltages"})
_OFTEN_S, _SELDOM_S = 0.0, 10.0  # a disk must work to give its temperature


class HwmonChip(Probe):
    """One chip of the hwmon class.

    Args:
        host: the machine.
        path: folder of the chip.
    """

    def __init__(self, host: Host, path: str) -> None:
        super().__init__(host, path)
        self._files: list[str] = []

    def look(self) -> list[Signal]:
        if not self._files:
            self.name = self.host.text(f"{self.path}/name")
            self._files = self.host.names(self.path)
            self.kind = _KINDS.get(self.name, Kind.CHIP)
            self.every_s = _OFTEN_S if self.name in _KINDS else _SELDOM_S
        if not self.host.exists(f"{self.path}/name"):
            self._files = []
            raise Absent("the chip is gone")
        found = [one for file in self._files for one in self._signals(file)]
        return found + self._rails() if self.kind is Kind.POWER else found

    def _signals(self, file: str) -> list[Signal]:
        parts = re.fullmatch(r"(temp|fan|power)(\d+)_(input|average)", file)
        if parts and parts[1] == "temp":
            return [self._temperature(parts[2], file)]
        if parts and parts[1] == "fan":
            return [self.read(Kind.FAN, self._label(f"fan{parts[2]}"), file)]
        if parts and self.kind is not Kind.POWER:
            return [self.read(Kind.OTHER_POWER, self._label(f"power{parts[2]}"), file, 1e-6)]
        if file == "in0_lcrit_alarm" and self.kind is Kind.SUPPLY_ALARM:
            return [self.read(Kind.SUPPLY_ALARM, "supply too weak", file)]
        if self.kind is Kind.POWER and re.fullmatch(r"curr\d+_crit_alarm", file):
            return [self.read(Kind.SUPPLY_ALARM, "current too high", file)]
        return []

    def _temperature(self, number: str, file: str) -> Signal:
        critical = self.number_or_none(f"temp{number}_crit")
        celsius = critical / 1000 if critical and 30_000 <= critical <= 150_000 else None
        own = self.name in _THROTTLES_AT_CRITICAL
        return self.read(
            Kind.HEAT if self.kind is Kind.HEAT else Kind.TEMPERATURE,
            self._label(f"temp{number}"),
            file,
            1e-3,
            limit=celsius if own else None,
            hard_limit=None if own else celsius,
        )

    def _rails(self) -> list[Signal]:
        """Power of the rails in W.  INA3221 gives volts and amperes of three channels; other chips give the power."""
        powers = [file for file in self._files if re.fullmatch(r"power\d+_input", file)]
        if powers:
            return [self.read(Kind.POWER, self._label(file.removesuffix("_input")), file, 1e-6) for file in powers]
        channels = [file[2:-6] for file in self._files if re.fullmatch(r"in[1-3]_input", file)]
        rails = {channel: self._label(f"in{channel}") for channel in channels if f"curr{channel}_input" in self._files}
        return [self._rail(channel, name) for channel, name in rails.items() if name not in _NOT_RAILS]

    def _rail(self, channel: str, name: str) -> Signal:
        source = f"{self.path}/curr{channel}_input"
        try:
            milliamps = self.host.number(source)
            watts = milliamps * self.host.number(f"{self.path}/in{channel}_input") * 1e-6
        except Unreadable as error:
            return Signal(Kind.POWER, name, None, source, problem=str(error))
        return signal(Kind.POWER, name, watts, source, note=f"times in{channel}_input")

    def _label(self, channel: str) -> str:
        file = f"{channel}_label"
        try:
            return self.host.text(f"{self.path}/{file}") if file in self._files else f"{self.name} {channel}"
        except Unreadable:
            return f"{self.name} {channel}"


class IioRails(Probe):
    """The INA3221 chip under the kernel of JetPack 4, with files rail_name_N and in_powerN_input (mW)."""

    kind = Kind.POWER

    def look(self) -> list[Signal]:
        rails = []
        for file in self.host.names(self.path):
            if channel := re.fullmatch(r"rail_name_(\d)", file):
                name = self.host.text(f"{self.path}/{file}")
                if name not in _NOT_RAILS:
                    rails.append(self.read(Kind.POWER, name, f"in_power{channel[1]}_input", 1e-3))
        return rails
