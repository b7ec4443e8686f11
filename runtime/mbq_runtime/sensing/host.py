"""Access to the machine for the sensors: files below a root folder, a clock, commands and one ioctl."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_LARGEST_BYTES = 1 << 20
_NUMBER = re.compile(r"[+-]?\d+")

RunCommand = Callable[[Sequence[str], float], str]
Ioctl = Callable[[int, int, bytearray], object]


class Unreadable(Exception):
    """A sensor gave no value; the message is the reason, in a few words."""


class Absent(Unreadable):
    """The file does not exist, or no longer exists."""


class NotFitted(Unreadable):
    """This machine does not have the device; this is no fault."""


class SwitchedOff(Unreadable):
    """The device is present but switched off, such as the clock of a processor that is offline."""


_BY_ERRNO = {errno.ENOENT: Absent, errno.ENOTDIR: Absent, errno.ENODEV: Absent, errno.EBUSY: SwitchedOff}


@dataclass(frozen=True)
class Host:
    """Access to one machine, or to a folder that imitates one.

    Args:
        root: prefix of every path; "" on the real machine.
        clock: returns seconds that never go back.
        run: runs a command, as ``run_command`` does.
        ioctl: sends a request to an open device, as ``fcntl.ioctl`` does.
    """

    root: str
    clock: Callable[[], float]
    run: RunCommand
    ioctl: Ioctl

    def text(self, path: str) -> str:
        """The content of a file, without white space and NUL bytes around it.

        Args:
            path: the file, below ``root``.

        Raises:
            Unreadable: the file cannot be read, is empty, or is larger than 1 MiB.
        """
        data = b""
        try:
            handle = os.open(self.root + path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                while piece := os.read(handle, 65536):
                    data += piece
                    if len(data) > _LARGEST_BYTES:
                        raise Unreadable(f"more than {_LARGEST_BYTES} bytes")
            finally:
                os.close(handle)
        except OSError as error:
            raise reason(error) from error
        if not (text := data.decode(errors="replace").strip("\0 \t\r\n")):
            raise Unreadable("empty")
        return text

    def number(self, path: str) -> int:
        """The whole number in a file.

        Args:
            path: the file, below ``root``.

        Raises:
            Unreadable: the file cannot be read, or contains anything else.
        """
        return whole_number(self.text(path))

    def names(self, folder: str) -> list[str]:
        """The names in a folder, sorted; numbers in names are sorted by value.

        Args:
            folder: the folder, below ``root``.

        Raises:
            Unreadable: the folder cannot be read.
        """
        try:
            return sorted(os.listdir(self.root + folder), key=_in_order)
        except OSError as error:
            raise reason(error) from error

    def device(self, path: str) -> str:
        """The path of the device that a link of /sys/class leads to, without ``root``.

        Args:
            path: the link, below ``root``.
        """
        return os.path.realpath(self.root + path).removeprefix(os.path.realpath(self.root or "/").rstrip("/"))

    def exists(self, path: str) -> bool:
        """Whether a file or folder exists.

        Args:
            path: the file or folder, below ``root``.
        """
        return os.path.exists(self.root + path)


def whole_number(text: str) -> int:
    """The whole number that a text contains.

    Args:
        text: decimal digits, with a sign or without.

    Raises:
        Unreadable: the text contains anything else, or more than 40 characters.
    """
    if len(text) > 40 or not _NUMBER.fullmatch(text):
        raise Unreadable(f"not a number: {text[:40]!r}")
    return int(text)


def reason(error: OSError) -> Unreadable:
    """The error as ``Unreadable`` or one of its subclasses, with the text of the operating system.

    Args:
        error: what the operating system raised.
    """
    kind = _BY_ERRNO.get(error.errno or 0, Unreadable)
    return kind((error.strerror or str(error)).lower())


def run_command(command: Sequence[str], timeout_s: float) -> str:
    """The standard output of a command.  A command that takes too long is killed with its child processes.

    Args:
        command: program and arguments.
        timeout_s: longest time in s.

    Raises:
        Unreadable: the command cannot be started, fails, or takes too long.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        raise reason(error) from error
    with process:
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise Unreadable(f"{command[0]} did not answer in {timeout_s:g} s") from None
    if process.returncode:
        raise Unreadable(f"{command[0]} failed with code {process.returncode}")
    return output.decode(errors="replace")


def _in_order(name: str) -> tuple[object, ...]:
    """hwmon2 before hwmon10."""
    return tuple((int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name))
