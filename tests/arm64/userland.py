"""An arm64 Linux userland in a folder: what a board installs, run under emulation.

``Userland.open()`` returns a folder that holds Debian's arm64 Python with the shared libraries it
needs and a shell, the aarch64 wheels of this project's base requirements, a static ``qemu-aarch64``,
and ``proot``, with which emulated programs start others.  Nothing is installed on the host and no
root is needed: packages are fetched through a private apt state and unpacked with ``dpkg-deb``;
wheels come from pip.

The folder lies in ``$MBQ_TEST_CACHE`` (default ``~/.cache/mbq-export-tests``), named by a hash
of everything it is made from, and is built aside and renamed: a killed build leaves nothing
that a later one would mistake for a finished userland.

As a script::

    python tests/arm64/userland.py build                             # prints the folder
    python tests/arm64/userland.py sizes                             # what the base install weighs
    python tests/arm64/userland.py run --cpu cortex-a72 -- -c "import onnxruntime"
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from board_packages import (
    REPO,
    SUITE,
    UNUSED_PACKAGES,
    WHEEL_PLATFORMS,
    UserlandError,
    Wheel,
    base_requirements,
    call,
    download_packages,
    install_wheels,
    pinned,
    size_table,
)

MERGED_FOLDERS = ("bin", "lib", "lib64", "sbin")  # symlinks into usr/ on a merged-/usr system
BOUND_FOLDERS = ("dev", "home/board", "proc", "wheels")  # where a board's shell sees folders of the host
LAYOUT_VERSION = 2  # raise it when the way the folder is laid out changes

# Part numbers (MIDR) by QEMU's name of the core; the features come from the emulator itself.
CPU_PARTS = {
    "cortex-a53": 0xD03,
    "cortex-a57": 0xD07,
    "cortex-a72": 0xD08,
    "cortex-a76": 0xD0B,
    "neoverse-n1": 0xD0C,
    "max": 0xD40,
}
# The kernel's names for the bits of AT_HWCAP and AT_HWCAP2, lowest bit first.
HWCAP_NAMES = (
    "fp", "asimd", "evtstrm", "aes", "pmull", "sha1", "sha2", "crc32", "atomics", "fphp", "asimdhp", "cpuid",
    "asimdrdm", "jscvt", "fcma", "lrcpc", "dcpop", "sha3", "sm3", "sm4", "asimddp", "sha512", "sve", "asimdfhm",
    "dit", "uscat", "ilrcpc", "flagm", "ssbs", "sb", "paca", "pacg",
)  # fmt: skip
HWCAP2_NAMES = (
    "dcpodp", "sve2", "sveaes", "svepmull", "svebitperm", "svesha3", "svesm4", "flagm2", "frint", "svei8mm",
    "svef32mm", "svef64mm", "svebf16", "i8mm", "bf16", "dgh",
)  # fmt: skip
READ_HWCAP = (
    "import ctypes; f = ctypes.CDLL(None).getauxval; f.argtypes = [ctypes.c_ulong]; f.restype = ctypes.c_ulong; "
    "print(f(16), f(26))"
)

DEFAULT_CPU = "cortex-a76"


def cache_folder() -> Path:
    """Where built userlands are kept between runs."""
    named = os.environ.get("MBQ_TEST_CACHE", "0")  # "0" turns off the cache of exports alone
    return Path(named) if named not in ("", "0") else Path.home() / ".cache" / "mbq-export-tests"


@dataclass(frozen=True)
class Userland:
    """A finished userland at ``folder``, with this work tree's ``mbq_runtime`` at ``overlay``."""

    folder: Path
    overlay: Path

    @classmethod
    def open(cls) -> Userland:
        """The userland for the present requirements, built first if it is not there yet (10 to 20 s)."""
        requirements = pinned(base_requirements())
        made_from = (LAYOUT_VERSION, SUITE.name, SUITE.packages, WHEEL_PLATFORMS, SUITE.python, sorted(requirements))
        folder = cache_folder() / f"arm64-{hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]}"
        _build_once(folder, lambda draft: _build(draft, requirements))
        return cls(folder, _runtime_copy(folder))

    @property
    def root(self) -> Path:
        """The unpacked file tree, the same for every core."""
        return self.folder / "root"

    @property
    def wheels(self) -> list[Wheel]:
        """The wheels of the base install, as pip resolved them."""
        rows = json.loads((self.folder / "wheels.json").read_text(encoding="utf-8"))
        return [Wheel(**{**row, "requires": tuple(row["requires"])}) for row in rows]

    def run(
        self,
        args: Sequence[str | Path],
        cpu: str = DEFAULT_CPU,
        env: Mapping[str, str] | None = None,
        timeout: float = 300.0,
        input: str | None = None,
        emulator: Sequence[str | Path] = (),
    ) -> subprocess.CompletedProcess[str]:
        """Run the userland's ``python3 ARGS`` on an emulated ``cpu`` (a name QEMU knows).

        Paths in ``args`` are the host's; the host's environment is not passed on, ``env`` is.
        emulator: a command of QEMU's to use instead of the userland's own.
        A negative return code is a signal, as for any child process.  Raises
        subprocess.TimeoutExpired after ``timeout`` seconds.
        """
        return self._emulate(self.cpu_root(cpu), cpu, args, env, timeout, input, emulator)

    def type(
        self,
        commands: Sequence[str],
        home: Path,
        env: Mapping[str, str] | None = None,
        cpu: str = DEFAULT_CPU,
        timeout: float = 1800.0,
    ) -> subprocess.CompletedProcess[str]:
        """Type commands into the board's shell.  The first that fails ends it.

        Unlike ``run``, whatever a command starts is emulated too, and all see the board's files alone: proot follows
        each call to the system.  pip finds the wheels of the base install in a folder, and no index.

        Args:
            commands: lines of a shell.
            home: the board's home folder, in which the commands run.
            env: more variables.
            cpu: a name QEMU knows.
            timeout: seconds, after which subprocess.TimeoutExpired is raised.
        """
        host = self.folder / "host"
        loader = next(path for path in host.rglob("ld-linux-*.so.*") if not path.is_symlink())
        libraries = {str(path.parent) for path in host.rglob("*.so.*")}
        bound = {"/proc": "/proc", "/dev": "/dev", self.cpu_root(cpu) / "proc/cpuinfo": "/proc/cpuinfo",
                 home: "/home/board", self.folder / "wheels": "/wheels"}  # fmt: skip
        command = [loader, "--library-path", ":".join(sorted(libraries)), host / "usr/bin/proot"]
        command += ["-q", f"{self.folder / SUITE.qemu} -cpu {cpu}", "-r", self.root, "-w", "/home/board"]
        for outside, inside in bound.items():
            command += ["-b", f"{outside}:{inside}"]
        environment = {
            "HOME": "/home/board",
            "LANG": "C.UTF-8",
            "PATH": "/usr/bin:/bin",
            "PIP_FIND_LINKS": "/wheels",
            "PIP_NO_COMPILE": "1",  # it takes minutes
            "PIP_NO_INDEX": "1",
            "PROOT_NO_SECCOMP": "1",
            "PROOT_TMP_DIR": str(home),
            "TMPDIR": "/home/board",
            **(env or {}),
        }
        command += ["/bin/dash", "-ec", "\n".join(commands)]
        return subprocess.run(
            [str(part) for part in command], env=environment, timeout=timeout, stdin=subprocess.DEVNULL,
            capture_output=True, encoding="utf-8", check=False,
        )  # fmt: skip

    def interpreter(self, cpu: str = DEFAULT_CPU) -> list[str]:
        """The command of ``python3`` on an emulated core.

        Args:
            cpu: a name QEMU knows.
        """
        return self._python(self.cpu_root(cpu), cpu)

    def cpu_root(self, cpu: str) -> Path:
        """The file tree as a machine with this core shows it: links into the root and a /proc/cpuinfo of its own.

        Libraries that read /proc/cpuinfo would otherwise see the host's and, on a host that is
        not arm64, crash or misjudge the features.  One folder per core and never rewritten, so
        that runs on different cores can go on at once.
        """
        folder = self.folder / "cpus" / re.sub(r"[^A-Za-z0-9.-]", "_", cpu)

        def build(draft: Path) -> None:
            for entry in (entry for entry in self.root.iterdir() if entry.name != "proc"):
                (draft / entry.name).symlink_to(Path("../../root") / entry.name)
            found = self._emulate(self.root, cpu, ["-I", "-c", READ_HWCAP], None, 60.0, None)
            if found.returncode != 0:
                raise UserlandError(f"{SUITE.qemu} -cpu {cpu} does not run: {found.stderr.strip()[-500:]}")
            hwcap, hwcap2 = map(int, found.stdout.split())
            (draft / "proc").mkdir()
            (draft / "proc" / "cpuinfo").write_text(_cpuinfo(cpu, hwcap_names(hwcap, hwcap2)), encoding="ascii")

        _build_once(folder, build)
        return folder

    def _python(self, root: Path, cpu: str, emulator: Sequence[str | Path] = ()) -> list[str]:
        """The command of the emulated interpreter."""
        program = root / f"usr/bin/python{SUITE.python}"
        return [*map(str, emulator or [self.folder / SUITE.qemu]), "-cpu", cpu, "-L", str(root), str(program)]

    def environment(self, python: Sequence[str]) -> dict[str, str]:
        """All variables of an emulated process.

        Args:
            python: its command, as ``interpreter`` gives it.
        """
        return {
            "HOME": "/nonexistent",
            "LANG": "C.UTF-8",
            # A process that starts another one, such as the renderer of chat templates, needs the emulator for it.
            "MBQ_PYTHON": shlex.join(python),
            "ORT_DISABLE_TELEMETRY": "1",
            "PATH": "/usr/bin:/bin",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": str(self.overlay),
        }

    def _emulate(
        self,
        root: Path,
        cpu: str,
        args: Sequence[str | Path],
        env: Mapping[str, str] | None,
        timeout: float,
        input: str | None,
        emulator: Sequence[str | Path] = (),
    ) -> subprocess.CompletedProcess[str]:
        python = self._python(root, cpu, emulator)
        return subprocess.run(
            [*python, *map(str, args)],
            env=self.environment(python) | {**(env or {})},
            timeout=timeout,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )


def hwcap_names(hwcap: int, hwcap2: int) -> list[str]:
    """Feature names, in the kernel's order, of the two words a process gets from getauxval."""
    tables = ((hwcap, HWCAP_NAMES), (hwcap2, HWCAP2_NAMES))
    return [name for word, names in tables for bit, name in enumerate(names) if word >> bit & 1]


def _cpuinfo(cpu: str, features: Sequence[str]) -> str:
    """An arm64 kernel's /proc/cpuinfo with as many cores as the host has."""
    part = CPU_PARTS.get(cpu.split(",")[0], CPU_PARTS["cortex-a76"])
    lines = []
    for index in range(os.cpu_count() or 1):
        lines += [
            f"processor\t: {index}",
            "BogoMIPS\t: 108.00",
            f"Features\t: {' '.join(features)}",
            "CPU implementer\t: 0x41",
            "CPU architecture: 8",
            "CPU variant\t: 0x0",
            f"CPU part\t: 0x{part:03x}",
            "CPU revision\t: 1",
            "",
        ]
    return "\n".join(lines) + "\n"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Make ``folder`` by ``build(draft)`` and a rename, unless it is there; one process at a time builds it."""
    if folder.is_dir():
        return
    with _locked(folder.parent / f".{folder.name}.lock"):
        if folder.is_dir():
            return
        for abandoned in folder.parent.glob(f".{folder.name}.draft-*"):
            shutil.rmtree(abandoned)
        draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.draft-"))
        try:
            build(draft)
            draft.chmod(0o755)
            draft.rename(folder)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise


def _build(draft: Path, requirements: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory(dir=draft, prefix="downloads-") as downloads:
        root = draft / "root"
        for name in MERGED_FOLDERS:
            (root / "usr" / name).mkdir(parents=True)
            (root / name).symlink_to(f"usr/{name}")
        for package in download_packages(Path(downloads) / "apt"):
            name, _, architecture = package.stem.split("_")
            if name == SUITE.qemu_package:
                call(["dpkg-deb", "-x", package, Path(downloads) / "qemu"], "unpack the emulator")
                shutil.move(Path(downloads) / "qemu/usr/bin" / SUITE.qemu, draft / SUITE.qemu)
            elif name not in UNUSED_PACKAGES and architecture in ("arm64", "all"):
                call(["dpkg-deb", "-x", package, root], f"unpack {package.name}")
            elif name not in UNUSED_PACKAGES:  # proot with its libraries
                call(["dpkg-deb", "-x", package, draft / "host"], f"unpack {package.name}")
        for unused in ("usr/share/doc", "usr/share/man", "usr/share/locale"):
            shutil.rmtree(root / unused, ignore_errors=True)
        if not (root / "bin/sh").exists():  # the package's own script links it
            (root / "bin/sh").symlink_to("dash")
        certificates = Path("/etc/ssl/certs/ca-certificates.crt")  # the package's own script joins them; pip reads them
        if certificates.is_file():
            (root / certificates.parent.relative_to("/")).mkdir(parents=True, exist_ok=True)
            shutil.copy(certificates, root / certificates.relative_to("/"))
        for place in BOUND_FOLDERS:
            (root / place).mkdir(parents=True, exist_ok=True)
        wheels = install_wheels(draft / "wheels", root / "usr/lib/python3/dist-packages", requirements)
    (draft / "wheels.json").write_text(json.dumps([asdict(wheel) for wheel in wheels], indent=1), encoding="utf-8")
    (draft / "cpus").mkdir()
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if here == SUITE.python:  # bytecode is portable between machines, not between Python versions
        libraries = [root / f"usr/lib/python{SUITE.python}", root / "usr/lib/python3/dist-packages"]
        command = [sys.executable, "-m", "compileall", "-q", "-j", "0", "-x", r"/(tests?|lib2to3)/", *libraries]
        subprocess.run([str(part) for part in command], stdout=subprocess.DEVNULL, check=False)


def _runtime_copy(folder: Path) -> Path:
    """A folder for PYTHONPATH holding ``mbq_runtime`` as the work tree has it now, named by its content."""
    source = REPO / "runtime" / "mbq_runtime"
    files = sorted(path for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    contents = {path.relative_to(source): path.read_bytes() for path in files}
    digest = hashlib.sha256()
    for name, content in contents.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    copy = folder / "overlays" / digest.hexdigest()[:16]

    def build(draft: Path) -> None:
        for name, content in contents.items():
            target = draft / "mbq_runtime" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)

    _build_once(copy, build)
    return copy


def main() -> int:
    parser = argparse.ArgumentParser(description="Build and use the arm64 userland of the tests.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="build it if needed and print its folder")
    commands.add_parser("sizes", help="print the sizes of the base install's wheels")
    run = commands.add_parser("run", help="run its python3; arguments after --")
    run.add_argument("--cpu", default=DEFAULT_CPU)
    run.add_argument("--timeout", type=float, default=300.0)
    run.add_argument("args", nargs="*")
    options = parser.parse_args()
    started = time.monotonic()
    try:
        userland = Userland.open()
    except UserlandError as error:
        sys.exit(f"userland: {error}")
    if options.command == "build":
        print(f"{userland.folder} ({time.monotonic() - started:.1f} s)")
    elif options.command == "sizes":
        print(size_table(userland.wheels))
    else:
        done = userland.run(options.args, options.cpu, timeout=options.timeout)
        sys.stdout.write(done.stdout)
        sys.stderr.write(done.stderr)
        return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
