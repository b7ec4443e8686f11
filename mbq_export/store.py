"""What a calibration has finished, on disk: a killed export goes on where it stopped.

One safetensors file a step, listed with its SHA-256 in ``steps.json`` once it is whole.  The folder
belongs to one set of inputs, named by a fingerprint: with other inputs it is emptied.

Of several processes the first keeps all of this.  The others have a folder each for the slices that need not be in
memory, and find nothing in it that an earlier run has left.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
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

_INDEX = "steps.json"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _mapped(path: Path) -> dict[str, NDArray[np.generic]]:
    """By way of torch, whose tensors are the file itself, mapped into memory."""
    return {name: tensor.numpy() for name, tensor in load_file(path).items()}


def _slices(arrays: Arrays) -> dict[str, Sliced]:
    names = {name.rpartition(":")[0] for name in arrays}
    return {
        name: Sliced(arrays[f"{name}:codes"], arrays[f"{name}:scale"], arrays[f"{name}:offset"])  # type: ignore[arg-type]
        for name in sorted(names)
    }


class Store:
    """Finished steps in ``folder``, or, without one, a store that forgets."""

    def __init__(self, folder: Path | None, fingerprint: str = "") -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self._hashes: dict[str, str] = {}
        if folder is None:
            return
        if processes.index():
            self.folder = folder = folder.with_name(f"{folder.name}.{processes.index()}")
            self.fingerprint = fingerprint = f"process {processes.index()}"
            shutil.rmtree(folder, ignore_errors=True)
        try:
            index = json.loads((folder / _INDEX).read_bytes())
            if index["fingerprint"] == fingerprint:
                self._hashes = index["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        if not self._hashes:
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def finished(self) -> int:
        """How many steps were found on disk or have been put there."""
        return len(self._hashes)

    def arrays(self, step: str) -> dict[str, NDArray[np.generic]] | None:
        """The arrays of a finished step, mapped from its file, or None when it has to be done (again).

        Every process is given the first one's.
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
        """Keep the arrays of ``step``, in place of those it had.  Raises BundleError when they cannot be written."""
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
        """The slices of a finished step by unit, or None when it has to be done."""
        arrays = self.arrays(step)
        if arrays is None:
            return None
        return self.put(step, _slices(arrays)) if processes.index() else _slices(arrays)

    def put(self, step: str, slices: dict[str, Sliced]) -> dict[str, Sliced]:
        """Keep the slices of ``step``, and return them as they are kept: of a model's codes none need be in memory."""
        if self.folder is None:
            return slices
        arrays: dict[str, NDArray[np.generic]] = {}
        for name, sliced in slices.items():
            arrays |= {f"{name}:codes": sliced.codes, f"{name}:scale": sliced.scale, f"{name}:offset": sliced.offset}
        self._write(self.folder, step, arrays)
        # What was hashed a moment ago is not read to be hashed once more.
        return _slices(_mapped(self._path(step)))

    def remove(self) -> None:
        """The work is done: forget it."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, step: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{step}.safetensors"
