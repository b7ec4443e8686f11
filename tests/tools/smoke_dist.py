"""Try what `make dist` has built: each file is installed into a bare environment and used there.

    python tests/tools/smoke_dist.py dist

The wheel and the source distribution must hold the same files.  In each environment, which has what a board
has and nothing else, the smoke test asks for the version, verifies a tiny bundle and lets it answer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "tests" / "runtime"))
PACKAGES = {"mbq_export": REPO, "mbq_runtime": REPO / "runtime", "mbq_targets": REPO / "targets"}
UNWANTED = ("torch", "transformers", "onnx", "tvm")
"""Modules that a board does not need, and that the plain wheel must not bring."""


def call(*command: str | Path) -> str:
    """Run a command outside the repository, without its modules on the path.

    Args:
        command: program and arguments.

    Returns:
        What it printed on stdout.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=tempfile.gettempdir(),
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def source_files() -> set[str]:
    """List the files that a wheel must hold, by their path in it."""
    return {
        file.relative_to(root).as_posix()
        for package, root in PACKAGES.items()
        for file in (root / package).rglob("*")
        if file.is_file() and file.parent.name != "__pycache__"
    }


def wheel_files(wheel: Path) -> set[str]:
    """List the files of a wheel but those of its metadata.

    Args:
        wheel: path of the wheel.
    """
    with zipfile.ZipFile(wheel) as opened:
        return {name for name in opened.namelist() if ".dist-info/" not in name}


def check_files(wheel: Path, sdist: Path, scratch: Path) -> None:
    """Compare the wheel with the repository, and with a wheel built from the source distribution.

    Args:
        wheel: path of the wheel.
        sdist: path of the source distribution.
        scratch: empty folder.
    """
    for name, found in (("lacks", source_files() - wheel_files(wheel)), ("adds", wheel_files(wheel) - source_files())):
        if found:
            raise SystemExit(f"{wheel.name} {name} {', '.join(sorted(found))}: check package-data in pyproject.toml")
    call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", scratch, sdist)
    (rebuilt,) = scratch.glob("*.whl")
    if wheel_files(rebuilt) != wheel_files(wheel):
        raise SystemExit(f"{sdist.name} builds a wheel of other files: {wheel_files(rebuilt) ^ wheel_files(wheel)}")


def smoke(file: Path, bundle: Path, scratch: Path) -> None:
    """Install one file into a bare environment and use it.

    Args:
        file: wheel or source distribution.
        bundle: tiny bundle to run.
        scratch: empty folder.
    """
    version = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"]
    call(sys.executable, "-m", "venv", scratch / "venv")
    binaries = scratch / "venv" / "bin"
    constraints = REPO / "constraints.txt"
    call(binaries / "pip", "--disable-pip-version-check", "install", "--quiet", "-c", constraints, file)
    said = call(binaries / "mbq", "--version")
    if version not in said:
        raise SystemExit(f"{file.name}: mbq --version says {said!r}, not {version}")
    call(binaries / "mbq", "verify", bundle)
    call(binaries / "mbq", "inspect", bundle)
    reply = json.loads(call(binaries / "mbq", "run", bundle, "a b c", "--max-tokens", "4", "--json"))
    if len(reply["tokens"]) != 4:
        raise SystemExit(f"{file.name}: mbq run answered {len(reply['tokens'])} tokens, not 4")
    check = f"import importlib.util as u; print([n for n in {UNWANTED!r} if u.find_spec(n)])"
    brought = call(binaries / "python", "-c", check).strip()
    if brought != "[]":
        raise SystemExit(f"{file.name} brings {brought}, which a board does not need")
    print(f"{file.name}: installed, version {version}, verifies and runs a bundle")


def main() -> None:
    """Check the wheel and the source distribution in a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    from tiny_bundle import write_bundle

    with tempfile.TemporaryDirectory() as scratch:
        bundle = write_bundle(Path(scratch) / "bundle")
        for name in ("rebuilt", "wheel", "sdist"):
            (Path(scratch) / name).mkdir()
        check_files(wheel, sdist, Path(scratch) / "rebuilt")
        smoke(wheel, bundle, Path(scratch) / "wheel")
        smoke(sdist, bundle, Path(scratch) / "sdist")


if __name__ == "__main__":
    main()
