"""The finished steps of a calibration, on disk: a killed export goes on where it stopped.

Each step is one safetensors file.  ``steps.json`` lists it with its SHA-256 when the file is complete.  The folder
belongs to one set of inputs, which a fingerprint names.  With other inputs the folder is emptied.

Of several processes, the first keeps all steps.  Each of the others has a folder of its own for slices that need
not stay in memory, and starts with an empty one.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import fields
from glob import escape
from hashlib import file_digest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file
from safetensors.torch import load_file

from mbq_runtime.errors import BundleError

from . import processes
from .format.codes import Sliced

Arrays = Mapping[str, NDArray[np.generic]]

log = logging.getLogger(__name__)

_INDEX = "steps.json"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _mapped(path: Path) -> dict[str, NDArray[np.generic]]:
    """The arrays of a file.  torch maps the file, so that its arrays take no memory."""
    return {name: tensor.numpy() for name, tensor in load_file(path).items()}


def _slices(arrays: Arrays) -> dict[str, Sliced]:
    names = {name.rpartition(":")[0] for name in arrays}
    return {
        name: Sliced(*(arrays[f"{name}:{field.name}"] for field in fields(Sliced)))  # type: ignore[arg-type]
        for name in sorted(names)
    }


def remove_stale(folder: Path) -> None:
    """Remove the folders that further processes of a killed export left behind.

    Args:
        folder: the first process's, of an export that has one process alone.
    """
    for stale in folder.parent.glob(f"{escape(folder.name)}.[0-9]*"):
        shutil.rmtree(stale, ignore_errors=True)


def _hashes(index: Path, fingerprint: str) -> dict[str, str]:
    """SHA-256 of each finished step.  None is finished if the index is missing or damaged, or of other inputs."""
    try:
        found = json.loads(index.read_bytes())
        if found["fingerprint"] != fingerprint:
            return {}
        if isinstance(found["sha256"], dict):
            return found["sha256"]
        problem = f"field 'sha256' is {found['sha256']!r:.40}, needed: an object"
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        problem = "it cannot be read"
    log.warning("%s: %s; the calibration begins again", index, problem)
    return {}


class Store:
    """Finished steps in a folder.  Without a folder, nothing is kept.

    Args:
        folder: where the steps are kept, or None.
        fingerprint: names the inputs of the calibration.
    """

    def __init__(self, folder: Path | None, fingerprint: str = "") -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self._hashes: dict[str, str] = {}
        if folder is None:
            return
        if processes.index():
            self.folder = folder = folder.with_name(f"{folder.name}.{processes.index()}")
            self.fingerprint = fingerprint = f"process {processes.index()}"
            shutil.rmtree(folder, ignore_errors=True)
        self._hashes = _hashes(folder / _INDEX, fingerprint)
        if not self._hashes:
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def finished(self) -> int:
        """The number of steps that are on disk."""
        return len(self._hashes)

    def arrays(self, step: str) -> dict[str, NDArray[np.generic]] | None:
        """The arrays of a finished step, mapped from its file.  Every process receives the first one's.

        Args:
            step: the step's name.

        Returns:
            Arrays by name, or None when the step has to be done.
        """
        return processes.from_first(self._kept(step))

    def _kept(self, step: str) -> dict[str, NDArray[np.generic]] | None:
        if self.folder is None or step not in self._hashes:
            return None
        path = self._path(step)
        try:
            return _mapped(path) if _digest(path) == self._hashes[step] else None
        except OSError:
            return None

    def put_arrays(self, step: str, arrays: Arrays) -> None:
        """Keep the arrays of a step, in place of those it had.

        Args:
            step: the step's name.
            arrays: arrays by name.

        Raises:
            BundleError: the arrays cannot be written.
        """
        if self.folder is not None and processes.index() == 0:
            self._write(self.folder, step, arrays)

    def _write(self, folder: Path, step: str, arrays: Arrays) -> None:
        draft = folder / ".part"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, draft)
            self._hashes[step] = _digest(draft)
            os.replace(draft, self._path(step))
            draft.write_text(json.dumps({"fingerprint": self.fingerprint, "sha256": self._hashes}))
            os.replace(draft, folder / _INDEX)
        except (OSError, SafetensorError) as error:
            raise BundleError(
                f"{folder}: writing failed ({getattr(error, 'strerror', None) or error}); free some space and run "
                "the same command again: what was finished before is kept"
            ) from error

    def get(self, step: str) -> dict[str, Sliced] | None:
        """The slices of a finished step.

        Args:
            step: the step's name.

        Returns:
            Slices by unit, or None when the step has to be done.
        """
        arrays = self.arrays(step)
        if arrays is None:
            return None
        return self.put(step, _slices(arrays)) if processes.index() else _slices(arrays)

    def put(self, step: str, slices: dict[str, Sliced]) -> dict[str, Sliced]:
        """Keep the slices of a step.

        Args:
            step: the step's name.
            slices: slices by unit.

        Returns:
            The same slices, mapped from their file, so that they need not stay in memory.

        Raises:
            BundleError: the slices cannot be written.
        """
        if self.folder is None:
            return slices
        arrays: dict[str, NDArray[np.generic]] = {}
        for name, sliced in slices.items():
            arrays |= {f"{name}:{field.name}": getattr(sliced, field.name) for field in fields(Sliced)}
        self._write(self.folder, step, arrays)
        # The file was hashed when it was written: do not hash it again.
        return _slices(_mapped(self._path(step)))

    def remove(self) -> None:
        """Delete all finished steps."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, step: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{step}.safetensors"
