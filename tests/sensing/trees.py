"""Builds /proc and /sys of a board from a table, as its kernel lays them out, and breaks single files of it."""

from __future__ import annotations

import errno
import os
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mbq_runtime.sensing.host import Absent

# A file that cannot be read even by root: reading a process's memory at address 0 fails as a dead I2C chip does.
UNREADABLE = "-> /proc/self/mem"
_MAILBOX_MARK = "mailbox of the firmware"


def build(root: Path, files: Mapping[str, str]) -> Path:
    """Write every file, a newline at its end as kernels do; "-> PATH" makes a link.

    Folders below /sys/class are links into /sys/devices there, and so they are here.
    """
    for path, content in files.items():
        parts = path.split("/")
        if path.startswith("/sys/class/") and len(parts) > 5:
            device, link = root / "sys/devices/virtual" / "/".join(parts[3:5]), root / "/".join(parts[1:5])
            device.mkdir(parents=True, exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(os.path.relpath(device, link.parent))
        write(root, path, content)
    return root


def write(root: Path, path: str, content: str) -> None:
    file = root / path.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    if content.startswith("-> /proc/"):
        file.symlink_to(content[3:])
    elif content.startswith("-> "):
        file.symlink_to(os.path.relpath(root / content[4:], file.parent))
    else:
        data = (content if content.endswith("\0") else content + "\n").encode()
        # Not cut to nothing first: a file system may then wait for its disk.
        handle = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.write(handle, data)
        os.ftruncate(handle, len(data))
        os.close(handle)


def remove(root: Path, path: str) -> None:
    file = root / path.lstrip("/")
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink()


def _replace(make: Callable[[Path], object]) -> Callable[[Path, str], None]:
    def fault(root: Path, path: str) -> None:
        remove(root, path)
        make(root / path.lstrip("/"))

    return fault


# What can happen to a file.
FAULTS: dict[str, Callable[[Path, str], None]] = {
    "missing": remove,
    "unreadable": _replace(lambda file: file.symlink_to("/proc/self/mem")),
    "a folder": _replace(lambda file: file.mkdir()),
    "empty": _replace(lambda file: file.write_text("")),
    "cut short": _replace(lambda file: file.write_text("\n")),
    "absurd": _replace(lambda file: file.write_text("99999999999999999999\n")),
    "absurd below zero": _replace(lambda file: file.write_text("-99999999999999999999\n")),
    "words": _replace(lambda file: file.write_text("no such thing\n")),
    "bytes": _replace(lambda file: file.write_bytes(bytes(range(255, 0, -1)))),
    "endless": _replace(lambda file: file.write_bytes(b"7" * 1_100_000)),
}


# From now on whoever opens the file waits.
hang = _replace(os.mkfifo)


def answer(root: Path, path: str, text: str = "") -> None:
    """Let those who wait at the file go on, with ``text``."""
    try:
        handle = os.open(root / path.lstrip("/"), os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:  # nobody waits
            raise
        return
    os.write(handle, text.encode())
    os.close(handle)


class Clock:
    """Stands still until told."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Commands:
    """Answers commands from a table; there are no others."""

    def __init__(self, answers: Mapping[tuple[str, ...], str]) -> None:
        self.answers = dict(answers)
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, command: Sequence[str], timeout_s: float) -> str:
        self.asked.append(tuple(command))
        if tuple(command) not in self.answers:
            raise Absent("no such file or directory")
        return self.answers[tuple(command)]


class Mailbox:
    """/dev/vcio of a Raspberry Pi: two properties of its firmware."""

    node = _MAILBOX_MARK  # what stands in the file that takes its place

    def __init__(self, throttled: int | None = None, commands: Mapping[str, str] | None = None) -> None:
        self.throttled = throttled
        self.commands = dict(commands or {})
        self.asked = 0

    def __call__(self, device: int, request: int, message: bytearray) -> int:
        if os.pread(device, 100, 0).decode().strip() != _MAILBOX_MARK:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        assert request == 0xC0086400
        size, code, tag, value_size, answered, first = struct.unpack_from("<6I", message)
        assert (size, code, answered, first) == (len(message), 0, 0, 0), "a whole question that changes nothing"
        assert struct.unpack_from("<I", message, 20 + value_size) == (0,), "closed by an end tag"
        self.asked += 1
        if tag == 0x00030046 and self.throttled is not None:
            struct.pack_into("<I", message, 20, self.throttled)
        elif tag == 0x00030080 and (text := self.commands.get(bytes(message[24:]).split(b"\0")[0].decode())):
            message[24 : 24 + len(text)] = text.encode()
        else:
            struct.pack_into("<I", message, 4, 0x80000001)
            return 0
        struct.pack_into("<I", message, 4, 0x80000000)
        struct.pack_into("<I", message, 16, 0x80000000 | value_size)
        return 0
