"""What the userland is made of: Debian's arm64 packages and the base install's aarch64 wheels.

Both are only downloaded and unpacked.  apt works on a state of its own, so that the host's
package database, architectures and sources stay as they are and no root is needed.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

REPO = Path(__file__).resolve().parents[2]


class Suite(NamedTuple):
    """A release of Debian that boards run.

    name: of the release, as Debian's mirrors have it.
    python: version of its Python.
    qemu_package: the package with its static emulator.
    qemu: name of the emulator.
    """

    name: str
    python: str
    qemu_package: str
    qemu: str

    @property
    def packages(self) -> tuple[str, ...]:
        """The arm64 packages that a board has: Python with its libraries, and what the pages' commands need."""
        python = (f"python{self.python}-minimal", f"libpython{self.python}-stdlib")
        return (*python, "libstdc++6", "libgomp1", "dash", "coreutils", "python3-pip", "python3-venv")


SUITES = {
    suite.name: suite
    for suite in (
        # What Raspberry Pi OS and most board images of the same age are built from.
        Suite("bookworm", "3.11", "qemu-user-static", "qemu-aarch64-static"),
        # What newer images, and Debian in Termux, are.  Its static emulators have the names that dynamic ones had.
        Suite("trixie", "3.13", "qemu-user", "qemu-aarch64"),
    )
}
SUITE = SUITES[os.environ.get("MBQ_TEST_SUITE", "bookworm")]
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
SHELL_PACKAGE = "proot"
"""Package of the host with the program that lets the emulated processes start others."""
# Pulled in by dependencies, used by package managers only.
UNUSED_PACKAGES = ("dpkg", "tar")
# glibc versions a wheel may ask for: 2.28 is the oldest any supported board has.
WHEEL_PLATFORMS = (*(f"manylinux_2_{minor}_aarch64" for minor in range(28, 16, -1)), "manylinux2014_aarch64")


class UserlandError(RuntimeError):
    """The userland could not be built; the message says which step failed and why."""


@dataclass(frozen=True)
class Wheel:
    """One wheel of the base install: sizes in bytes, requirements as its metadata states them."""

    name: str
    version: str
    wheel_bytes: int
    unpacked_bytes: int
    requires: tuple[str, ...]


def base_requirements() -> list[str]:
    """The project's base requirements, as pyproject.toml lists them."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return list(project["dependencies"])


def pinned(requirements: Sequence[str]) -> list[str]:
    """The same requirements at the versions installed here, so that host and board run one release."""
    pins = []
    for text in requirements:
        requirement = Requirement(text)
        try:
            pins.append(f"{requirement.name}=={importlib.metadata.version(requirement.name)}")
        except importlib.metadata.PackageNotFoundError:
            pins.append(text)
    return pins


def download_packages(folder: Path) -> list[Path]:
    """Fetch the arm64 packages with all they depend on, and the host's builds of the emulator and of proot.

    apt works on a state of its own under ``folder`` that knows no installed package, so the
    host's package database is neither read nor written and dependencies come out complete.
    """
    for name in ("lists/partial", "archives/partial", "parts"):
        (folder / name).mkdir(parents=True)
    (folder / "status").touch()
    (folder / "sources.list").write_text(f"deb [signed-by={KEYRING}] {_debian_mirror()} {SUITE.name} main\n", "utf-8")
    host = call(["dpkg", "--print-architecture"], "ask for the host's architecture").strip()
    # The host's way to the network (proxies, certificates) holds here too; its sources and hooks do not.
    network = [
        line
        for line in call(["apt-config", "dump", "--no-empty", "--format", '%F "%v";%n'], "read apt's settings").split(
            "\n"
        )
        if line.startswith("Acquire::") and not line.startswith(("Acquire::IndexTargets", "Acquire::Changelogs"))
    ]
    settings = {
        "Dir::Etc::main": "/dev/null",
        "Dir::Etc::parts": folder / "parts",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": folder / "parts",
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": folder / "parts",
        "Dir::State": folder,
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder,
        "Dir::Log": folder,
        "APT::Architecture": "arm64",
        "APT::Install-Recommends": "false",
        "APT::Update::Error-Mode": "any",
        "APT::Sandbox::User": "",  # the download user may not enter a private folder
        "Acquire::Retries": "3",
        "Acquire::Languages": "none",
    }
    lines = network + [f'{key} "{value}";' for key, value in settings.items()]
    lines.append(f'APT::Architectures {{ "arm64"; "{host}"; }};')
    (folder / "apt.conf").write_text("\n".join(lines) + "\n", encoding="utf-8")
    environment = {**os.environ, "APT_CONFIG": str(folder / "apt.conf"), "LC_ALL": "C"}
    call(["apt-get", "-q", "update"], "read the package lists", environment)
    packages = [*SUITE.packages, f"{SUITE.qemu_package}:{host}", f"{SHELL_PACKAGE}:{host}"]
    call(["apt-get", "-q", "-y", "--download-only", "install", *packages], "fetch the packages", environment)
    return sorted((folder / "archives").glob("*.deb"))


def _debian_mirror() -> str:
    """The Debian mirror the host uses, or ``$MBQ_TEST_DEBIAN_MIRROR``."""
    if mirror := os.environ.get("MBQ_TEST_DEBIAN_MIRROR"):
        return mirror
    sources = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    for source in sources:
        if source.is_file():
            text = re.sub(r"(?m)^\s*#.*$", "", source.read_text(encoding="utf-8"))
            if found := re.search(r"[a-z+]+:/\S+/debian/?(?=\s)", text):
                return found[0]
    raise UserlandError(
        "no Debian mirror in this machine's apt sources: set MBQ_TEST_DEBIAN_MIRROR to the address of one "
        f"(it must carry {SUITE.name} for arm64)"
    )


def install_wheels(downloads: Path, site: Path, requirements: Sequence[str]) -> list[Wheel]:
    """Resolve and unpack the aarch64 wheels into ``site``; returns them by name."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    choice: list[str | Path] = ["--only-binary=:all:", "--implementation", "cp", "--python-version", SUITE.python]
    choice += [f"--platform={platform}" for platform in WHEEL_PLATFORMS]
    call([*pip, "download", "-q", "-d", downloads, *choice, *requirements], "fetch the aarch64 wheels")
    files = sorted(downloads.glob("*.whl"))
    offline: list[str | Path] = ["--no-index", "--no-deps", "--no-compile", "--target", site]
    call([*pip, "install", "-q", *offline, *choice, *files], "unpack the aarch64 wheels")
    return [_describe(file) for file in files]


def _describe(file: Path) -> Wheel:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        metadata_name = next(m.filename for m in members if m.filename.endswith(".dist-info/METADATA"))
        metadata = archive.read(metadata_name).decode("utf-8")
    name, version = file.name.split("-")[:2]
    return Wheel(
        name=name.replace("_", "-").lower(),
        version=version,
        wheel_bytes=file.stat().st_size,
        unpacked_bytes=sum(member.file_size for member in members),
        requires=tuple(re.findall(r"(?m)^Requires-Dist: (.+?)\s*$", metadata)),
    )


def call(command: Sequence[str | Path], purpose: str, env: Mapping[str, str] | None = None) -> str:
    """Run a host command; returns its output, or raises UserlandError with the end of what it said."""
    try:
        done = subprocess.run(
            [str(part) for part in command],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except FileNotFoundError:
        raise UserlandError(f"cannot {purpose}: {command[0]} is not on this machine (a Debian system has it)") from None
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise UserlandError(f"cannot {purpose}: {command[0]} ended with {done.returncode}: {said}")
    return done.stdout


def size_table(wheels: Sequence[Wheel]) -> str:
    """The base install's wheels as lines of text, sizes in MB (10^6 bytes), the sum last."""
    rows = [(f"{wheel.name} {wheel.version}", wheel.wheel_bytes, wheel.unpacked_bytes) for wheel in wheels]
    rows.append(("sum", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    return "\n".join(f"{name:28} {packed / 1e6:7.1f} MB {unpacked / 1e6:8.1f} MB" for name, packed, unpacked in rows)
