"""What a test needs from the machine it runs on.

A test that lacks something is skipped on a person's machine.  Under ``CI=true`` it fails, so that nothing goes
untested without notice.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

GPU_ENGINES = {"android-adreno": "opencl", "webgpu": "webgpu"}
"""Target of the tests' GPU bundles -> engine."""


def missing(what: str) -> NoReturn:
    """Skip the running test, or fail it where ``CI`` is set.

    Args:
        what: what is missing and how to get it, in one line.
    """
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"missing under CI: {what}", pytrace=False)
    pytest.skip(what)


def module(name: str) -> ModuleType:
    """Import a module that the test needs.

    Args:
        name: dotted name.

    Returns:
        The module.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing(f"no module {name} ({error}): pip install -e '.[dev]'")


def package_file(package: str, pattern: str) -> Path:
    """Find a file of an installed package without importing the package.

    Args:
        package: name under which the package is imported.
        pattern: glob relative to the package's folder.

    Returns:
        The first file that matches.
    """
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else spec.submodule_search_locations or []
    for folder in folders:
        for file in sorted(Path(folder).glob(pattern)):
            return file
    missing(f"no {pattern} of package {package}: make .venv/.dev")


def environment(name: str) -> str:
    """Find an environment beside the one of the tests, for packages that do not go with theirs.

    Args:
        name: its folder in the environment of the tests.

    Returns:
        Its Python.
    """
    python = Path(sys.prefix) / name / "bin" / "python"
    return str(python) if python.exists() else missing(f"no {python}: make .venv/.{name}")


def program(name: str) -> str:
    """Find a program.

    Args:
        name: its name on the search path.

    Returns:
        Its path.
    """
    return shutil.which(name) or missing(f"no {name}: make system-packages")


@cache
def _gpu_problem(engine: str) -> str | None:
    from mbq_runtime.engine import opencl, webgpu
    from mbq_runtime.errors import UsageError

    try:
        {"opencl": opencl, "webgpu": webgpu}[engine].Device()
    except UsageError as error:
        return str(error)
    return None


def gpu(engine: str) -> None:
    """Require a device and its driver.

    Args:
        engine: "opencl" or "webgpu".
    """
    problem = _gpu_problem(engine)
    if problem is not None:
        missing(f"{problem}; make system-packages")
