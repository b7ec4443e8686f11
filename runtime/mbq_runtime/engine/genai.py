"""The engine "onnx": a bundle's graph on onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.genai_config import cache_bytes, keeping, read_settings, state_bytes
from mbq_runtime.bundle.layout import whole_blocks
from mbq_runtime.bundle.manifest import Manifest

from .imports import engine_errors, import_engine
from .outputs import first_row
from .private import GRAPH, LINK, WEIGHTS_FOLDER, engine_folder, ops_library, trimmed_graph
from .threads import SHORT_SPINNING, ops_threads
from .tokenizer import Tokenizer


class Backend:
    """Runs a bundle's graph, see ``backend.Backend``.

    path: folder of the bundle.
    manifest: the bundle's manifest.
    threads: processor threads.
    """

    keeps = False  # onnxruntime-genai takes no keys and values

    def __init__(self, path: Path, manifest: Manifest, threads: int) -> None:
        og = import_engine("onnxruntime_genai")
        # Before the engine loads: nothing reads the file after its check.
        settings = read_settings(path, manifest)
        self.token_bytes, self.state_bytes = cache_bytes(manifest, settings), state_bytes(manifest, settings)
        self._kv_bits = manifest.kv_bits
        self.rewinds = not keeping(manifest)
        self.marks = bool(manifest.model.states)  # the engine's convolutions alone cannot go back
        # At other levels the engine also prints each error that it throws.
        session: dict[str, Any] = {
            "log_severity_level": 4,
            "intra_op_num_threads": threads,
            SHORT_SPINNING[0]: SHORT_SPINNING[1],
        }
        graph = trimmed_graph(path, manifest)
        if graph is not None:
            session[WEIGHTS_FOLDER] = LINK
        with engine_errors(f"{path}: the engine cannot load it"), engine_folder(path, manifest, session) as folder:
            config = og.Config(str(folder))
            if graph is not None:
                config.add_model_data(f"{LINK}/{GRAPH}", graph)
            self._model = og.Model(config)
        self.tokenizer = Tokenizer(path)
        self._threads = ops_threads(self, ops_library(path, manifest))
        self.use_threads(threads)
        self._og = og

    def use_threads(self, count: int) -> bool:
        if self._threads is None:
            return False
        self._threads.mbq_set_threads(count)
        return True

    def start(self, length: int, budget: NDArray[np.float32]) -> _Context:
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(max_length=length if self._kv_bits == 32 else whole_blocks(length))
        generator = self._og.Generator(self._model, params)
        # The generator keeps pointers to these arrays, and reads them in every pass.  The context keeps the arrays.
        generator.set_model_input("avg_bits", budget)
        scored = np.zeros(1, np.int64)
        generator.set_model_input("scored", scored)
        return _Context(generator, scored, budget)


class _Context:
    def __init__(self, generator: Any, scored: NDArray[np.int64], budget: NDArray[np.float32]) -> None:
        self._generator, self._scored, self._budget = generator, scored, budget

    def append(self, tokens: NDArray[np.int32], rows: int = 1) -> None:
        # The graph always gives the last row, and more rows in an output of their own.
        self._scored[0] = rows if rows > 1 else 0
        self._generator.append_tokens(tokens)

    def logits(self) -> NDArray[np.float32]:
        return self._output("all_logits" if self._scored[0] else "logits", 3)

    def bits_used(self) -> float:
        return float(self._output("avg_bits_used", 1))

    def _output(self, name: str, dimensions: int) -> NDArray[np.float32]:
        return first_row(self._generator.get_output(name), name, dimensions)

    def kept(self, count: int) -> list[NDArray[Any]]:
        raise NotImplementedError

    def keep(self, count: int, arrays: Sequence[NDArray[Any]]) -> None:
        raise NotImplementedError

    def mark(self) -> None:
        self._generator.snapshot_state()

    def rewind(self, count: int) -> None:
        self._generator.rewind_to(count)
