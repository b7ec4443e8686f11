"""Importing the native packages, and turning their errors into errors of this project."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

from mbq_runtime.errors import BundleError, UsageError

_MAX_DRIVER_LOG = 2000  # characters


def import_engine(name: str) -> ModuleType:
    """Import a package of ONNX Runtime, with its usage reports switched off.

    Official builds keep a device id in the home folder and report usage over the network.  They do neither here,
    unless the environment has ORT_DISABLE_TELEMETRY=0.

    Args:
        name: "onnxruntime" or "onnxruntime_genai".

    Raises:
        UsageError: the package cannot be imported.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return import_module(name)
    except ImportError as error:
        package = name.replace("_", "-")
        raise UsageError(f"{package} cannot be imported ({error}): pip install {package}") from None


@contextmanager
def engine_errors(what: str) -> Iterator[None]:
    """Turn each error of a native package into a BundleError of one line.

    Args:
        what: start of the message: the file or folder, and what failed.
    """
    try:
        yield
    except UnicodeDecodeError:  # names in a broken file, which the native side puts into its message
        raise BundleError(f"{what}: names in its files are not UTF-8; check the files with mbq verify") from None
    # The exceptions of ONNX Runtime share no base class but Exception.  Those of genai and TVM are Python's.
    except Exception as error:
        if isinstance(error, RuntimeError) or type(error).__module__.startswith(("onnxruntime", "tvm_ffi")):
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BundleError(f"{what}: {reason}; check the files with mbq verify") from error
        raise


def does_not_compile(where: Path, driver: str, what: str, error: Exception) -> BundleError:
    """The error for kernels that a GPU driver refuses.

    Args:
        where: folder of the kernels.
        driver: name of the device and its driver.
        what: the kernels that were compiled.
        error: what the driver raised; its log becomes one line.
    """
    log = " | ".join(line.strip() for line in str(error).splitlines() if line.strip())[:_MAX_DRIVER_LOG]
    return BundleError(f"{where}: the driver of {driver} does not compile {what}: {log}")
