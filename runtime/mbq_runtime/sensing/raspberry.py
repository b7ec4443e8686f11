"""The firmware of a Raspberry Pi: whether it throttles and why, and the power rails of a Pi 5."""

from __future__ import annotations

import os
import re
import struct

from .host import NotFitted, Unreadable, reason
from .probe import Probe
from .signal import Kind, Signal, signal

# _IOWR(100, 0, char *): the size of the pointer is part of the number.
_PROPERTY_REQUEST = 0xC0006400 | struct.calcsize("P") << 16
_GET_THROTTLED, _GET_COMMAND_RESULT = 0x00030046, 0x00030080
_ANSWERED = 0x80000000
_COMMAND_BYTES = 4096

MAILBOX = "/dev/vcio"
TOOLS = ("/usr/bin/vcgencmd", "/opt/vc/bin/vcgencmd")
DRIVER = "/sys/bus/platform/drivers/raspberrypi-firmware"
BOARD = "/sys/firmware/devicetree/base/compatible"
_HAS_POWER_CHIP = "brcm,bcm2712"
_TOOL_TIMEOUT_S = 2.0

UNDERVOLTAGE, CAPPED, THROTTLED, SOFT_LIMIT = 1, 2, 4, 8
_BIT_NAMES = {
    UNDERVOLTAGE: "under-voltage",
    CAPPED: "frequency capped",
    THROTTLED: "throttled",
    SOFT_LIMIT: "soft temperature limit",
}


def describe(bits: int) -> str:
    """The throttle bits as text.

    >>> describe(0x50001)
    'now: under-voltage; before: under-voltage, throttled'

    Args:
        bits: the firmware's word.  The low 16 bits are the state now; the high 16 bits are the states since the start.
    """
    now = [name for bit, name in _BIT_NAMES.items() if bits & bit]
    before = [name for bit, name in _BIT_NAMES.items() if bits >> 16 & bit]
    return "; ".join(
        filter(None, [f"now: {', '.join(now)}" * bool(now), f"before: {', '.join(before)}" * bool(before)])
    )


class _Firmware(Probe):
    def _property(self, tag: int, value: bytes) -> bytes:
        """The answer of the mailbox, of the same length as ``value``.  Raises Unreadable."""
        message = bytearray(struct.pack("<5I", 24 + len(value), 0, tag, len(value), 0) + value + bytes(4))
        try:
            device = os.open(self.host.root + MAILBOX, os.O_RDWR | os.O_CLOEXEC)
            try:
                self.host.ioctl(device, _PROPERTY_REQUEST, message)
            finally:
                os.close(device)
        except OSError as error:
            raise reason(error) from error
        _, answer, _, _, answered = struct.unpack_from("<5I", message)
        if answer != _ANSWERED or not answered & _ANSWERED:
            raise Unreadable(f"the firmware refused property {tag:#x}")
        return bytes(message[20 : 20 + len(value)])

    def _ask_tool(self, *words: str) -> str:
        for tool in TOOLS:
            if self.host.exists(tool):
                return self.host.run([tool, *words], _TOOL_TIMEOUT_S)
        raise Unreadable("no vcgencmd")


class ThrottleBits(_Firmware):
    """The throttle bits, by the cheapest way that works.  Kernels since 2025 do not have the last way."""

    kind = Kind.THROTTLE_BITS
    shown = "firmware"

    def look(self) -> list[Signal]:
        problems = []
        for source, ask in ((MAILBOX, self._mailbox), ("vcgencmd get_throttled", self._tool), (DRIVER, self._file)):
            try:
                bits = ask()
            except Unreadable as error:
                problems.append(f"{source}: {error}")
            else:
                return [signal(self.kind, self.name, bits, source, note=describe(bits))]
        raise Unreadable("; ".join(problems))

    def _mailbox(self) -> int:
        # The value of the request is a mask of bits to clear: none.
        (bits,) = struct.unpack("<I", self._property(_GET_THROTTLED, bytes(4)))
        return int(bits)

    def _tool(self) -> int:
        return _hexadecimal(self._ask_tool("get_throttled"), r"throttled=0x([0-9a-f]{1,8})")

    def _file(self) -> int:
        devices = [f"{DRIVER}/{name}/get_throttled" for name in self.host.names(DRIVER)]
        for file in filter(self.host.exists, devices):
            return _hexadecimal(self.host.text(file), r"([0-9a-f]{1,8})")
        raise Unreadable("no get_throttled")


def _hexadecimal(text: str, pattern: str) -> int:
    if not (found := re.fullmatch(pattern, text.strip())):
        raise Unreadable(f"not an answer: {text.strip()[:40]!r}")
    return int(found[1], 16)


class PowerChip(_Firmware):
    """Power through the converters of a Pi 5.  The board draws more: USB and losses are not included."""

    kind = Kind.PROCESSOR_POWER
    every_s = 1.0
    shown = "PMIC rails"

    def look(self) -> list[Signal]:
        if _HAS_POWER_CHIP not in self.host.text(BOARD).split("\0"):
            self.every_s = 60.0
            raise NotFitted("this board has none")
        source = f"{MAILBOX} pmic_read_adc"
        try:
            text = self._command("pmic_read_adc")
        except Unreadable:
            text, source = self._ask_tool("pmic_read_adc"), "vcgencmd pmic_read_adc"
        amps, volts = (
            {name: float(value) for name, value in re.findall(rf"(\w+)_{unit} {what}\(\d+\)=(\d+\.\d+){unit}", text)}
            for unit, what in (("A", "current"), ("V", "volt"))
        )
        if not amps or not amps.keys() <= volts.keys():
            raise Unreadable(f"not the rails: {text[:40]!r}")
        watts = sum(amps[name] * volts[name] for name in amps)
        return [signal(self.kind, self.name, watts, source, note=f"{len(amps)} rails, without USB and losses")]

    def _command(self, words: str) -> str:
        question = struct.pack(f"<I{_COMMAND_BYTES}s", 0, words.encode())
        error, text = struct.unpack(f"<I{_COMMAND_BYTES}s", self._property(_GET_COMMAND_RESULT, question))
        if error:
            raise Unreadable(f"the firmware refused {words}")
        return bytes(text).split(b"\0", 1)[0].decode(errors="replace")
