"""One side of ``versus.py`` in a process of its own: ``versus_worker.py ENGINE PATH THREADS CONTEXT CLOCK``.

Loads, then answers a line of JSON ``{"sizes": [...], "bits": number}`` with the seconds of each pass: tokens
added to one fresh context, ``[128]`` for a prompt, ``[1, 1, ...]`` for decoding.  Tokens are random, nothing is
sampled, the logits of the last token are computed.  CLOCK is "wall", or "cpu" for the processor time of the one
thread that does the work: what can be compared while other programs run too.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np

Answer = dict[str, Any]
Timer = Callable[[Sequence[int], float], Answer]

PROBE_BYTES = 1 << 30


def _tokens(count: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 32000, count, np.int32)


def mbq(path: Path, threads: int, context: int, engine_name: str = "onnx") -> Timer:
    from mbq_runtime import Engine

    engine = Engine.load(path, threads=threads, context=context, engine=engine_name)

    def passes(sizes: Sequence[int], bits: float) -> Answer:
        done = engine.time_passes(sizes, bits)
        return {"seconds": done.seconds, "bits_used": done.avg_bits_used}

    return passes


class LlamaCpp:
    """A model of llama.cpp."""

    def __init__(self, path: Path) -> None:
        import llama_cpp as api

        self.api = api
        self._quiet = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(self._quiet, None)
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())

    def context(self, threads: int, length: int, **more: int) -> LlamaCppContext:
        """An empty context.  more: other fields of its parameters."""
        parameters = self.api.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = length, length, min(length, 512)
        parameters.n_threads = parameters.n_threads_batch = threads
        for name, value in more.items():
            setattr(parameters, name, value)
        state = self.api.llama_init_from_model(self._model, parameters)
        if not state:
            raise RuntimeError(f"llama.cpp made no context of {length} tokens with {more}")
        return LlamaCppContext(self, state)


class LlamaCppContext:
    """Tokens that llama.cpp has read."""

    def __init__(self, model: LlamaCpp, state: Any) -> None:
        self._model, self._state = model, state
        self._memory = model.api.llama_get_memory(state)

    def append(self, tokens: np.ndarray[Any, Any]) -> None:
        """Read tokens, with logits for the last."""
        api = self._model.api
        ids = (api.llama_token * len(tokens))(*tokens.tolist())
        status = api.llama_decode(self._state, api.llama_batch_get_one(ids, len(tokens)))
        api.llama_synchronize(self._state)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")

    def rewind(self, count: int) -> None:
        """Drop the last tokens.  count: of those that stay."""
        self._model.api.llama_memory_seq_rm(self._memory, 0, count, -1)


def llama_cpp(path: Path, threads: int, context: int) -> Timer:
    state = LlamaCpp(path).context(threads, context)

    def passes(sizes: Sequence[int], bits: float) -> Answer:
        state.rewind(0)
        ids, seconds, start = _tokens(sum(sizes)), [], 0
        for size in sizes:
            begin_s = time.perf_counter()
            state.append(ids[start : start + size])
            seconds.append(time.perf_counter() - begin_s)
            start += size
        return {"seconds": seconds}

    return passes


def genai(path: Path, threads: int, context: int) -> Timer:
    import onnxruntime_genai as og

    config = og.Config(str(path))
    options = {"intra_op_num_threads": threads, "log_severity_level": 4}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = og.Model(config)

    def passes(sizes: Sequence[int], bits: float) -> Answer:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=sum(sizes), do_sample=False)
        generator = og.Generator(model, parameters)
        ids, seconds, start = _tokens(sum(sizes)), [], 0
        for size in sizes:
            begin_s = time.perf_counter()
            generator.append_tokens(ids[start : start + size])
            seconds.append(time.perf_counter() - begin_s)
            start += size
        return {"seconds": seconds}

    return passes


_READ = """
#include <stdint.h>
uint64_t read_all(const uint64_t *p, uint64_t n) {
  uint64_t s[64] = {0};
  for (uint64_t i = 0; i < n; i += 64) {
    for (int j = 0; j < 64; j += 8) __builtin_prefetch(p + i + j + 1024);
    for (int j = 0; j < 64; ++j) s[j] ^= p[i + j];
  }
  for (int j = 1; j < 64; ++j) s[0] ^= s[j];
  return s[0];
}
"""


def probe(path: Path, threads: int, context: int) -> Timer:
    """Reads PROBE_BYTES with every thread at once, asked for 8 KB ahead; the ceiling of what a decode step can read."""
    folder = Path(tempfile.mkdtemp())
    (folder / "read.c").write_text(_READ)
    command = ["-m", "ziglang", "cc", "-O3", "-march=native", "-shared", "-fPIC", "-o", "read.so", "read.c"]
    subprocess.run([sys.executable, *command], cwd=folder, check=True, capture_output=True)
    read = ctypes.CDLL(str(folder / "read.so")).read_all
    read.argtypes, read.restype = (ctypes.c_void_p, ctypes.c_uint64), ctypes.c_uint64
    data = np.ones(PROBE_BYTES // 8, np.uint64)
    share = len(data) // threads // 64 * 64
    run = ThreadPoolExecutor(threads).map if threads > 1 else map

    def passes(sizes: Sequence[int], bits: float) -> Answer:
        seconds = []
        for _ in sizes:
            begin_s = time.perf_counter()
            list(run(lambda i: read(data.ctypes.data + 8 * share * i, share), range(threads)))
            seconds.append(time.perf_counter() - begin_s)
        return {"seconds": seconds}

    return passes


ENGINES: dict[str, Callable[[Path, int, int], Timer]] = {
    "mbq": mbq, "mbq tvm": partial(mbq, engine_name="tvm"), "llama.cpp": llama_cpp, "genai": genai, "probe": probe,
}  # fmt: skip


def main(engine: str, path: str, threads: str, context: str, clock: str) -> None:
    if clock == "cpu":
        time.perf_counter = time.thread_time  # of the engines' own timing too
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not mix with answers
    begin_s = time.perf_counter()
    passes = ENGINES[engine](Path(path), int(threads), int(context))
    passes([1], 8.0)
    ready: Answer = {"first_token_s": time.perf_counter() - begin_s}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        print(json.dumps(passes(wanted["sizes"], wanted["bits"])), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
