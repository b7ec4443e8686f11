"""What runs a bundle's model: one row for each kind of engine, and what ``Engine`` asks of them.

A new kind is a module here with a class ``Backend``, a row of ``ENGINES``, and a row of
``mbq_runtime.bundle.manifest.ENGINE_FILES`` for the files it cannot do without.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.manifest import Manifest
from mbq_runtime.errors import UsageError

from .generation import Sampling
from .tokenizer import Tokenizer


class Run(Protocol):
    """One context while it is being filled."""

    def append(self, tokens: NDArray[np.int32]) -> None:
        """One pass over ``tokens`` [n], with the budget as it is now."""

    def logits(self) -> NDArray[np.float32]:
        """float32 [n, vocab]: of every token of the last pass.  Only where ``start`` was told ``every``."""

    def bits_used(self) -> float:
        """Average bits per weight of the last pass, over its tokens."""

    def next_token(self) -> int | None:
        """Choose a token and append it, with a pass over the one before if that is still due; None when full."""


class Backend(Protocol):
    """A loaded model.  Made with ``(path, manifest, threads)``; whatever the native side throws passes through."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    def start(self, length: int, budget: NDArray[np.float32], sampling: Sampling | None, *, every: bool = False) -> Run:
        """An empty context for ``length`` tokens.

        budget: float32 [1], read anew in every pass; sampling: None for the likeliest token; every:
        logits of all tokens will be asked for, not only a next token.
        """

    def use_threads(self, count: int) -> bool:
        """From now on, ``count`` of the threads it was made with; False where that cannot be changed."""


class Kind(NamedTuple):
    """module: beside this one, holding ``Backend``; extra: the extra of mbq-export it comes with, or ""."""

    module: str
    extra: str


ENGINES = {
    "onnx": Kind("genai", ""),
    "tvm": Kind("tvm", "tvm"),
    "opencl": Kind("opencl", "opencl"),
    "webgpu": Kind("webgpu", "webgpu"),
}


def choose(manifest: Manifest, path: Path, wanted: str | None) -> str:
    """The engine to run the bundle with: ``wanted``, or the bundle's own choice.

    Raises UsageError for one that does not exist, or that the bundle was not exported for.
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


def load(name: str, path: Path, manifest: Manifest, threads: int) -> Backend:
    """Raises UsageError when a package is missing, BundleError when the model cannot be loaded."""
    backend: Backend = import_module(f"{__package__}.{ENGINES[name].module}").Backend(path, manifest, threads)
    return backend
