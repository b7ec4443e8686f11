"""The engine "tvm": a decoder compiled to one library, run by TVM's runtime library without its compiler.

The package ``tvm_ffi`` is imported.  ``libtvm_runtime.so`` is loaded from the folder of the package ``tvm``, which
is not imported.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.facts import by_shape
from mbq_runtime.bundle.file_names import DECODER_LIBRARY
from mbq_runtime.bundle.genai_config import cache_bytes, caches, keeping, read_settings, state_bytes, states
from mbq_runtime.bundle.layout import KEY_LANES, kv_row_bytes, whole_blocks
from mbq_runtime.bundle.manifest import Manifest
from mbq_runtime.bundle.tensors import WEIGHTS
from mbq_runtime.errors import UsageError

from .imports import engine_errors
from .mapping import mapped
from .private import private_library
from .tokenizer import Tokenizer

_RUNTIME = "libtvm_runtime.so"
_CPU = 1  # number of the device in DLPack
_POOLED = 2  # kind of memory: the VM keeps what it allocated for the next pass


@cache
def _tvm() -> Any:
    """The package tvm_ffi, after TVM's runtime was loaded.  Raises UsageError, which says what to install."""
    try:
        import tvm_ffi

        found = importlib.util.find_spec("tvm")
        folders = list(found.submodule_search_locations or []) if found else []
        libraries = [path for folder in folders if (path := Path(folder, "lib", _RUNTIME)).is_file()]
        if not libraries:
            raise ImportError(f"no {_RUNTIME} in the package tvm")
        # Compiled code looks it up among the global symbols of the process.
        ctypes.CDLL(str(libraries[0]), mode=ctypes.RTLD_GLOBAL)
    except (ImportError, OSError) as error:
        raise UsageError(f"the engine tvm cannot be loaded ({error}): pip install 'mbq-export[tvm]'") from None
    return tvm_ffi


class Backend:
    """Runs a bundle's decoder library, see ``backend.Backend``.

    path: folder of the bundle.
    manifest: the bundle's manifest.
    threads: processor threads.
    """

    def __init__(self, path: Path, manifest: Manifest, threads: int) -> None:
        self.ffi = _tvm()
        self._path = path
        settings = read_settings(path, manifest)
        self.kv_bits = manifest.kv_bits
        kept = len(keeping(manifest))
        shapes = by_shape(caches(manifest, settings))
        self.caches = [(len(layers), *shape) for shape, layers in shapes.items()]
        # The last tokens lie one behind the other, each with all of its channels.
        held = [shape[::-1] if name == "conv" else shape for name, shape in states(manifest, settings).items()]
        self.states = [(kept, *shape) for shape in held]
        self.rewinds = self.keeps = kept == 0  # a state holds the last tokens alone
        self.marks = kept > 0
        self.vocab_size = manifest.model.vocab_size
        self.token_bytes, self.state_bytes = cache_bytes(manifest, settings), state_bytes(manifest, settings)
        library = private_library(path, manifest, DECODER_LIBRARY)
        with engine_errors(f"{path / DECODER_LIBRARY}: the engine cannot load it"):
            machine = self.ffi.load_module(str(library))["vm_load_executable"]()
            machine["vm_initialization"](_CPU, 0, _POOLED)
            self.functions = {name: machine[name] for name in ("decode", "prefill", "score")}
        # The file is mapped: pages that no depth reads stay on disk.
        (entry,) = (entry for entry in manifest.files if entry.name == WEIGHTS)
        self.weights = self.share(mapped(path / WEIGHTS, entry.size))
        # mbq_set_threads is a plain C function, which TVM does not see.
        self._library = ctypes.CDLL(str(library))
        self.use_threads(threads)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer."""
        return Tokenizer(self._path)

    def share(self, array: NDArray[Any]) -> Any:
        """A DLPack view of an array, as compiled code takes it.

        Args:
            array: stays the owner of its memory.
        """
        return self.ffi.from_dlpack(np.asarray(array))

    def use_threads(self, count: int) -> bool:
        self._library.mbq_set_threads(count)
        return True

    def start(self, length: int, budget: NDArray[np.float32]) -> _Context:
        return _Context(self, length, budget)


def _new_cache(
    layers: int, kv_heads: int, head_dim: int, blocks: int, kv_bits: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The keys and the values of all blocks with heads of one shape, for ``blocks`` times 16 positions."""
    positions = blocks * KEY_LANES
    if kv_bits == 8:
        rows = (layers, kv_heads, positions, kv_row_bytes(head_dim, kv_bits))
        return np.zeros(rows, np.uint8), np.zeros(rows, np.uint8)
    keys = np.zeros((layers, kv_heads, blocks, head_dim, KEY_LANES), np.float32)
    return keys, np.zeros((layers, kv_heads, positions, head_dim), np.float32)


class _Context:
    def __init__(self, backend: Backend, length: int, budget: NDArray[np.float32]) -> None:
        b, blocks = backend, -(-length // KEY_LANES)
        self._backend, self._rows = backend, 1
        self._past, self._used = np.zeros(1, np.int64), np.zeros(1, np.float32)
        # Every matrix reads the budget, and other threads may change it while a pass runs.
        self._budget, self._budget_of_pass = budget, budget.copy()
        self._caches: list[tuple[NDArray[Any], NDArray[Any]]] = [
            _new_cache(layers, kv_heads, head_dim, blocks, b.kv_bits) for layers, kv_heads, head_dim in b.caches
        ]
        state: list[NDArray[Any]] = [self._past, self._budget_of_pass, self._used, *chain(*self._caches)]
        self._states = [np.zeros(shape, np.float32) for shape in b.states]
        self._marked: list[NDArray[np.float32]] = []
        state += self._states
        self._state = [*(backend.share(array) for array in state), backend.weights]
        self._logits: Any = None

    def append(self, tokens: NDArray[np.int32], rows: int = 1) -> None:
        count, self._rows = len(tokens), rows
        self._budget_of_pass[:] = self._budget
        name = "decode" if count == 1 else "score" if rows > 1 else "prefill"
        ids = self._backend.share(tokens.astype(np.int64))
        self._logits = self._backend.functions[name](ids, *self._state)
        self._past += count

    def logits(self) -> NDArray[np.float32]:
        # The compiled head pads rows to whole blocks.
        return np.asarray(np.from_dlpack(self._logits), np.float32)[-self._rows :, : self._backend.vocab_size]

    def bits_used(self) -> float:
        return float(self._used[0])

    def kept(self, count: int) -> list[NDArray[Any]]:
        if self._backend.kv_bits == 8:
            return [part[:, :, : whole_blocks(count)] for part in chain(*self._caches)]
        of_each = ((keys[:, :, : -(-count // KEY_LANES)], values[:, :, :count]) for keys, values in self._caches)
        return [*chain(*of_each)]

    def keep(self, count: int, arrays: Sequence[NDArray[Any]]) -> None:
        for own, given in zip(self.kept(count), arrays, strict=True):
            own[...] = given
        self._past[:] = count

    def mark(self) -> None:
        if not self._marked:
            self._marked = [np.empty_like(state) for state in self._states]
        for copy, state in zip(self._marked, self._states, strict=True):
            copy[...] = state

    def rewind(self, count: int) -> None:
        for copy, state in zip(self._marked, self._states, strict=bool(self._marked)):
            state[...] = copy
        # Attention reads no key or value past the tokens that it is told of.
        self._past[:] = count
