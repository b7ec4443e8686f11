"""What a calibration has finished, on disk: a killed export goes on where it stopped.

One safetensors file a step, listed with its SHA-256 in ``steps.json`` once it is whole.  The folder
belongs to one set of inputs, named by a fingerprint: with other inputs it is emptied.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from hashlib import file_digest, sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from mbq_runtime.errors import BundleError

from .slicing.reference import Sliced

Arrays = Mapping[str, NDArray[np.generic]]

_INDEX = "steps.json"


class Store:
    """Finished steps in ``folder``, or, without one, a store that forgets."""

    def __init__(self, folder: Path | None, fingerprint: str = "") -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self._hashes: dict[str, str] = {}
        if folder is None:
            return
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
        """The arrays of a finished step, or None when it has to be done (again)."""
        if self.folder is None or step not in self._hashes:
            return None
        path = self._path(step)
        try:
            with path.open("rb") as file:
                if file_digest(file, "sha256").hexdigest() != self._hashes[step]:
                    return None
            return dict(load_file(path))
        except OSError:
            return None

    def put_arrays(self, step: str, arrays: Arrays) -> None:
        """Keep the arrays of ``step``, in place of those it had.  Raises BundleError when they cannot be written."""
        if self.folder is None:
            return
        content = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        self._hashes[step] = sha256(content).hexdigest()
        index = json.dumps({"fingerprint": self.fingerprint, "sha256": self._hashes})
        draft = self.folder / ".part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(content)
            os.replace(draft, self._path(step))
            draft.write_text(index)
            os.replace(draft, self.folder / _INDEX)
        except OSError as error:
            raise BundleError(
                f"{self.folder}: writing failed ({error.strerror or error}); free some space and run the same "
                "command again: what was finished before is kept"
            ) from error

    def get(self, step: str) -> dict[str, Sliced] | None:
        """The slices of a finished step by unit, or None when it has to be done."""
        arrays = self.arrays(step)
        if arrays is None:
            return None
        names = {name.rpartition(":")[0] for name in arrays}
        return {
            name: Sliced(arrays[f"{name}:codes"], arrays[f"{name}:scale"], arrays[f"{name}:offset"])  # type: ignore[arg-type]
            for name in sorted(names)
        }

    def put(self, step: str, slices: Mapping[str, Sliced]) -> None:
        """Keep the slices of ``step``."""
        arrays: dict[str, NDArray[np.generic]] = {}
        for name, sliced in slices.items():
            arrays |= {f"{name}:codes": sliced.codes, f"{name}:scale": sliced.scale, f"{name}:offset": sliced.offset}
        self.put_arrays(step, arrays)

    def remove(self) -> None:
        """The work is done: forget it."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, step: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{step}.safetensors"
