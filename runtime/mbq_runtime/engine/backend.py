"""The kinds of engine that run a bundle's model, and the interface that ``Engine`` uses.

A new kind needs a module in this folder with a class ``Backend``, a row of ``ENGINES``, and a row of
``mbq_runtime.bundle.file_names.ENGINE_FILES`` for the files that it must have.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.manifest import Manifest
from mbq_runtime.errors import UsageError

from .tokenizer import Tokenizer


class Context(Protocol):
    """The tokens so far, and their cache."""

    def append(self, tokens: NDArray[np.int32], rows: int = 1) -> None:
        """Run one pass, with the budget of this moment.

        Args:
            tokens: int32 [n], ids that are added to the context.
            rows: how many of the last tokens get logits, 1 to n.
        """

    def logits(self) -> NDArray[np.float32]:
        """float32 [rows, vocab]: logits of the last tokens of the last pass.  Valid until the next pass."""

    def bits_used(self) -> float:
        """Average bits per weight of the last pass, mean over its tokens."""

    def kept(self, count: int) -> list[NDArray[Any]]:
        """Keys and values of the first tokens.  Only where ``Backend.keeps`` is true.

        Args:
            count: how many tokens.
        """

    def keep(self, count: int, arrays: Sequence[NDArray[Any]]) -> None:
        """Take keys and values in place of those so far.  A pass must follow before the next logits.

        Args:
            count: of how many tokens.
            arrays: what ``kept`` returned for that many.
        """

    def mark(self) -> None:
        """Keep a copy of the states behind the tokens so far, in place of an earlier copy.

        Only where ``Backend.marks`` is true.
        """

    def rewind(self, count: int) -> None:
        """Drop the last tokens.  A pass must follow before the next logits.

        Args:
            count: tokens that stay, from 0 to the number so far; where ``Backend.rewinds`` is false, those of the last
                ``mark``.
        """


class Backend(Protocol):
    """A loaded model.  Errors of the native side pass through.

    The class is called as ``Backend(path, manifest, threads)``: folder of the bundle, its manifest, and the number of
    processor threads.
    """

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer."""

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token."""

    @property
    def state_bytes(self) -> int:
        """Bytes of a context's states, whatever its length; 0 where there are keys and values alone."""

    @property
    def rewinds(self) -> bool:
        """Whether contexts can drop their last tokens.  A state is that of the last alone."""

    @property
    def marks(self) -> bool:
        """Whether contexts with states can go back to a place that was marked."""

    @property
    def keeps(self) -> bool:
        """Whether contexts give their keys and values, and take them back."""

    def start(self, length: int, budget: NDArray[np.float32]) -> Context:
        """Begin an empty context.

        Args:
            length: most tokens of the context.
            budget: float32 [2], average bits per weight and the deepest depth; read again in every pass.
        """

    def use_threads(self, count: int) -> bool:
        """Change the number of processor threads.

        Args:
            count: from 1 to the number that the backend was made with.

        Returns:
            False where the number cannot be changed.
        """


class EngineKind(NamedTuple):
    """A kind of engine.

    module: name in this folder; the module holds ``Backend``.
    """

    module: str


ENGINES = {
    "onnx": EngineKind("genai"),
    "tvm": EngineKind("tvm"),
    "opencl": EngineKind("opencl"),
    "webgpu": EngineKind("webgpu"),
}


def choose_engine(manifest: Manifest, path: Path, wanted: str | None) -> str:
    """The kind of engine that will run a bundle: a key of ``ENGINES``.

    Args:
        manifest: the bundle's manifest.
        path: folder of the bundle, for messages.
        wanted: what was asked for; None for the bundle's default.

    Raises:
        UsageError: there is no such kind, or the bundle was not exported for it.
    """
    if wanted is None:
        return manifest.target.engine
    if wanted not in ENGINES:
        raise UsageError(f"engine {wanted!r} is not known; choose one of: {', '.join(ENGINES)}")
    if wanted not in manifest.engines:
        raise UsageError(
            f"{path}: the bundle has no engine {wanted}, only {', '.join(manifest.engines)}; leave --engine out, or "
            f"export it again with mbq-export --engine {wanted}"
        )
    return wanted


def load_backend(name: str, path: Path, manifest: Manifest, threads: int) -> Backend:
    """Load a bundle's model.

    Args:
        name: a key of ``ENGINES``.
        path: folder of the bundle.
        manifest: the bundle's manifest.
        threads: processor threads.

    Raises:
        UsageError: a package is not installed.
        BundleError: the model cannot be loaded.
    """
    backend: Backend = import_module(f"{__package__}.{ENGINES[name].module}").Backend(path, manifest, threads)
    return backend
