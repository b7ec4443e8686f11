"""The machine as the sensors see it: files below a root, a clock, commands and one ioctl."""

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
    """A sensor gave nothing; the message says why, in a few words."""


class Absent(Unreadable):
    """There is no such file, or no longer."""


class NotFitted(Unreadable):
    """This machine has no such device; nothing is wrong."""


class SwitchedOff(Unreadable):
    """The device is there but off, as the clocks of processors that were taken offline."""


_BY_ERRNO = {errno.ENOENT: Absent, errno.ENOTDIR: Absent, errno.ENODEV: Absent, errno.EBUSY: SwitchedOff}


@dataclass(frozen=True)
class Host:
    """root: prefix of every path, "" on the real machine; clock: seconds; run: see ``run_command``."""

    root: str
    clock: Callable[[], float]
    run: RunCommand
    ioctl: Ioctl

    def text(self, path: str) -> str:
        """The file's content without white space and NULs around it.  Raises Unreadable."""
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
        """The one whole number in the file.  Raises Unreadable."""
        return whole_number(self.text(path))

    def names(self, folder: str) -> list[str]:
        """What the folder holds, in order.  Raises Unreadable."""
        try:
            return sorted(os.listdir(self.root + folder), key=_in_order)
        except OSError as error:
            raise reason(error) from error

    def exists(self, path: str) -> bool:
        return os.path.exists(self.root + path)


def whole_number(text: str) -> int:
    """Raises Unreadable when ``text`` is anything else, however long."""
    if len(text) > 40 or not _NUMBER.fullmatch(text):
        raise Unreadable(f"not a number: {text[:40]!r}")
    return int(text)


def reason(error: OSError) -> Unreadable:
    """The error in the words a person would look for."""
    kind = _BY_ERRNO.get(error.errno or 0, Unreadable)
    return kind((error.strerror or str(error)).lower())


def run_command(command: Sequence[str], timeout_s: float) -> str:
    """What ``command`` prints.  Raises Unreadable; a command that takes too long is ended with its children."""
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
