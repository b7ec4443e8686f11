"""``Session``: a bundle's graph on plain ONNX Runtime, for programs that need its logits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.errors import BundleError, UsageError

from .allowance import Allowance
from .imports import engine_errors, import_engine
from .load import open_bundle
from .outputs import first_row
from .private import GRAPH, WEIGHTS_FOLDER, ops_library, trimmed_graph
from .prompt import checked_ids
from .score import Window
from .threads import SHORT_SPINNING, cores, ops_threads


def empty_past(shape: Sequence[int | str], kind: str = "tensor(float)") -> NDArray[Any]:
    """What a graph is given for the tokens before its first pass: no keys or values, and states of zeros.

    Args:
        shape: of the graph's input: batch first, then numbers, or names for numbers of tokens.
        kind: its element type, as ONNX Runtime names it.
    """
    sides = [1, *(side if isinstance(side, int) else 0 for side in shape[1:])]
    return np.zeros(sides, np.uint8 if kind == "tensor(uint8)" else np.float32)


def first_pass(session: Any, tokens: int) -> dict[str, NDArray[Any]]:
    """What a graph is given in a pass over an empty context, besides token ids, budget and ``scored``.

    Args:
        session: the graph's session of ONNX Runtime.
        tokens: of the pass.

    Returns:
        By name: the places of the tokens, int64 [1, tokens], and what ``empty_past`` makes.
    """
    places = {"attention_mask": np.ones((1, tokens), np.int64), "position_ids": np.arange(tokens, dtype=np.int64)[None]}
    found: dict[str, NDArray[Any]] = {}
    for value in session.get_inputs():
        if value.name in places:
            found[value.name] = places[value.name]
        elif value.name.startswith("past"):
            found[value.name] = empty_past(value.shape, value.type)
    return found


class Session:
    """A bundle's graph, without tokenizer, sampling or memory of earlier tokens.

    path: folder of the bundle.
    threads: processor threads; None for one per big core.

    Raises:
        BundleError: the bundle is incomplete, not for this machine, or has no ONNX graph.
        UsageError: ``threads`` is below 1, or onnxruntime is not installed.

    >>> Session("my-bundle").run([5, 6], avg_bits=4.0).logits.shape
    (2, 264)
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = None) -> None:
        self.path, self.manifest = open_bundle(path, threads)
        if "onnx" not in self.manifest.engines:
            raise BundleError(f"{self.path}: the bundle has no ONNX graph; export it again with --engine onnx")
        onnxruntime = import_engine("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads or cores()
        options.add_session_config_entry(*SHORT_SPINNING)
        library = ops_library(self.path, self.manifest)
        with engine_errors(f"{self.path}: the model cannot be loaded"):
            if library is not None:
                options.register_custom_ops_library(str(library))
            model: str | bytes = str(self.path / GRAPH)
            if (graph := trimmed_graph(self.path, self.manifest)) is not None:
                model = graph
                options.add_session_config_entry(WEIGHTS_FOLDER, str(self.path))
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        ops_threads(self, library)

    def run(self, tokens: Sequence[int], avg_bits: float) -> Window:
        """The logits of every token of a text, in an empty context.

        Args:
            tokens: 1 to ``context_length`` ids.
            avg_bits: budget in average bits per weight.

        Raises:
            UsageError: there are too many tokens, an id is none of the model, or the budget is out of range.
        """
        if not 1 <= len(tokens) <= self.manifest.model.context_length:
            raise UsageError(f"{len(tokens)} tokens: needed 1 to {self.manifest.model.context_length}")
        ids = checked_ids(tokens, self.manifest.model.vocab_size)
        budget = Allowance(self.manifest, self.manifest.budget.check(avg_bits, str(self.path)))
        feeds = {
            "input_ids": ids.astype(np.int64)[None],
            "avg_bits": budget.numbers,
            "scored": np.array([len(tokens)], np.int64),
            **first_pass(self._session, len(tokens)),
        }
        with engine_errors(f"{self.path}: the model failed"):
            logits, used = self._session.run(["all_logits", "avg_bits_used"], feeds)
        return Window(first_row(logits, "all_logits", 3), float(first_row(used, "avg_bits_used", 1)))
