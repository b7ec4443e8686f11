"""Time of a token and of a prompt's chunk behind a long context, with keys and values of float32 and of 8 bits.

    python tests/benchmarks/long_context.py BUNDLE --past 512,4096 --bits 4,8 --threads 1 --rounds 9 [--json FILE]
    python tests/benchmarks/long_context.py llama-1b --past 4096

BUNDLE is a folder, or a shape of ``versus_models.py``.  A shape has llama.cpp beside it, and a folder has it with
``--gguf FILE``: Q4_0 with keys and values of q8_0 and flash attention.

BUNDLE has float32 keys and values (``mbq-export --kv 32``) and the engine onnx.  Its twin with 8 bits is made from it,
so that all else is the same.  Passes, budgets and sides take turns in each round.  Times are of the processor, of all
threads together, and the least of all rounds, because other work on the machine only adds time.  Then both sides read
the pages of ``docs/``, and their next tokens are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from measured_on import measured_on
from named_bundles import bundle_of, gguf_of
from numpy.typing import NDArray
from onnx import TensorProto, helper
from versus_worker import LlamaCpp

from mbq_runtime import Engine
from mbq_runtime.bundle import listed_files, manifest
from mbq_runtime.bundle.file_names import MANIFEST_NAME, OPS_LIBRARY
from mbq_runtime.bundle.genai_config import FILE, read_settings
from mbq_runtime.bundle.layout import kv_row_bytes
from mbq_targets.build import build_ops_library
from mbq_targets.machines import resolve
from mbq_targets.spec import KernelSpec

CHUNK = 128
EMPTY = 16
"""Tokens of a context that counts as empty."""
KL_WINDOW = 1024
RIVAL, RIVAL_BITS = "llama.cpp Q4_0, q8_0", 4.5
"""Q4_0 has 4 bits and a scale of 16 for 32 weights."""
VOCABULARY = 32000
PAGES = Path(__file__).resolve().parents[2] / "docs"


def twin(bundle: Path, folder: Path) -> Path:
    """A copy of a bundle with keys and values of 8 bits, in an empty folder."""
    facts = manifest.read(bundle)
    if facts.kv_bits != 32:
        raise SystemExit(f"{bundle}: keys and values of {facts.kv_bits} bits; export it with --kv 32")
    settings = read_settings(bundle, facts)
    for path in bundle.rglob("*"):
        copy = folder / path.relative_to(bundle)
        if path.is_dir():
            copy.mkdir()
        elif path.name not in (MANIFEST_NAME, FILE, Path(OPS_LIBRARY).name, "model.onnx"):
            copy.write_bytes(path.read_bytes())
    graph = onnx.load(str(bundle / "model.onnx"), load_external_data=False)
    narrow(graph, settings.head_dim)
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    spec = KernelSpec(facts.profile, facts.group_size, facts.activation_bits, kv_bits=8)
    build_ops_library(resolve(facts.target.name), spec, folder / OPS_LIBRARY)
    facts = replace(facts, kv_bits=8)
    (folder / FILE).write_text(json.dumps(settings.document(facts)))
    manifest.write(replace(facts, files=listed_files.file_entries(folder)), folder)
    return folder


def narrow(model: onnx.ModelProto, head_dim: int) -> None:
    """Put this project's attention in the place of ONNX Runtime's."""
    for value in (*model.graph.input, *model.graph.output):
        kind = value.type.tensor_type
        if value.name.endswith((".key", ".value")):
            kind.elem_type = TensorProto.UINT8
            kind.shape.dim[3].dim_value = kv_row_bytes(head_dim, 8)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    known = {output for node in nodes for output in node.output}
    for node in nodes:
        if node.op_type != "GroupQueryAttention":
            model.graph.node.append(node)
            continue
        if "past_tokens" not in known:
            known.add("past_tokens")
            shape = helper.make_node("Shape", ["input_ids"], ["tokens"], start=1, end=2)
            model.graph.node.extend([shape, helper.make_node("Sub", ["total_length", "tokens"], ["past_tokens"])])
        has = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        inputs = [*node.input[:5], "past_tokens", *node.input[7:]]
        mine = helper.make_node(
            "CachedAttention", inputs, node.output, node.name, domain="ai.mbq",
            num_heads=has["num_heads"], kv_num_heads=has["kv_num_heads"], scale=has["scale"],
            window=max(has.get("local_window_size", 0), 0), softcap=float(has.get("softcap", 0)),
        )  # fmt: skip
        model.graph.node.append(mine)


class Side:
    """One bundle, with a context of each length."""

    def __init__(self, bundle: Path, lengths: list[int], threads: int) -> None:
        self.engine = Engine.load(bundle, engine="onnx", threads=threads, context=max(lengths) + CHUNK)
        self.budget = np.array([8, len(self.engine.manifest.slices)], np.float32)
        self.vocabulary = self.engine.manifest.model.vocab_size
        self.contexts, self.context_bytes = {}, {}
        for length in lengths:
            before = resident_bytes()
            self.contexts[length] = self.engine._backend.start(length + CHUNK, self.budget)
            self.context_bytes[length] = resident_bytes() - before
            for start in range(0, length, CHUNK):
                self.contexts[length].append(self.tokens(min(CHUNK, length - start), start))

    def tokens(self, count: int, seed: int) -> NDArray[np.int32]:
        return self.tokens_below(self.vocabulary, count, seed)

    @staticmethod
    def tokens_below(vocabulary: int, count: int, seed: int) -> NDArray[np.int32]:
        return np.random.default_rng(seed).integers(0, vocabulary, count, np.int32)

    def time_s(self, length: int, count: int, bits: float) -> float:
        """Seconds of the processor for a pass behind a context."""
        self.budget[0] = bits
        context, tokens = self.contexts[length], self.tokens(count, 1)
        start_s = time.process_time()
        context.append(tokens)
        context.logits()
        elapsed_s = time.process_time() - start_s
        context.rewind(length)
        return elapsed_s


class Rival:
    """llama.cpp, with a context of each length.  It has one budget."""

    def __init__(self, gguf: Path, lengths: list[int], threads: int) -> None:
        model = LlamaCpp(gguf)
        q8_0, flash = model.api.GGML_TYPE_Q8_0, model.api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.contexts, self.context_bytes = {}, {}
        for length in lengths:
            before = resident_bytes()
            made = model.context(threads, length + CHUNK, type_k=q8_0, type_v=q8_0, flash_attn_type=flash)
            self.contexts[length] = made
            for start in range(0, length, CHUNK):
                made.append(Side.tokens_below(VOCABULARY, min(CHUNK, length - start), start))
            self.context_bytes[length] = resident_bytes() - before

    def time_s(self, length: int, count: int, bits: float) -> float:
        """Seconds of the processor for a pass behind a context."""
        context, tokens = self.contexts[length], Side.tokens_below(VOCABULARY, count, 1)
        start_s = time.process_time()
        context.append(tokens)
        elapsed_s = time.process_time() - start_s
        context.rewind(length)
        return elapsed_s


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def log_probabilities(side: Side, window: NDArray[np.int32], bits: float) -> Any:
    """Of each next token, chunk by chunk."""
    side.budget[0] = bits
    context = side.engine._backend.start(len(window), side.budget)
    for start in range(0, len(window), CHUNK):
        part = window[start : start + CHUNK]
        context.append(part, len(part))
        logits = context.logits().astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        yield logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def divergence(exact: Side, rounded: Side, bits: float, windows: int) -> dict[str, float]:
    """What rounding changes: mean KL divergence in nats a token, and the share of tokens with the same first choice."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(PAGES.glob("*.md")))
    ids = np.asarray(exact.engine.encode(text[: 6 * windows * KL_WINDOW]), np.int32)[: windows * KL_WINDOW]
    kl, same = [], []
    for window in ids.reshape(-1, KL_WINDOW):
        for p, q in zip(*(log_probabilities(side, window, bits) for side in (exact, rounded)), strict=True):
            kl.append((np.exp(p) * (p - q)).sum(axis=1))
            same.append(p.argmax(axis=1) == q.argmax(axis=1))
    found = np.concatenate(kl)
    return {
        "kl_divergence": float(found.mean()), "kl_standard_error": float(found.std() / len(found) ** 0.5),
        "same_top": float(np.concatenate(same).mean()), "tokens": len(found),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--gguf", type=Path, help="llama.cpp's file of the same model, Q4_0.")
    parser.add_argument("--past", default="512,4096")
    parser.add_argument("--bits", default="4,8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--kl-windows", type=int, default=4, help="Windows of 1024 tokens that both sides read.")
    parser.add_argument("--json", type=Path, help="Write all figures here.")
    options = parser.parse_args()
    lengths, budgets = [EMPTY, *map(int, options.past.split(","))], [float(bits) for bits in options.bits.split(",")]
    bundle, gguf = bundle_of(options.bundle, 32), options.gguf or gguf_of(options.bundle, "Q4_0")
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        exact = Side(bundle, lengths, options.threads)
        rounded = Side(twin(bundle, Path(scratch)), lengths, options.threads)
        own = {"float32": exact, "8 bits": rounded}
        sides: dict[str, Side | Rival] = {**own}
        lines = list(product(own, budgets))
        if gguf is not None:
            sides[RIVAL] = Rival(gguf, lengths, options.threads)
            lines.append((RIVAL, RIVAL_BITS))
        rows = [(*line, length, count) for line in lines for length in lengths for count in (1, CHUNK)]
        seconds: dict[Any, list[float]] = {row: [] for row in rows}
        for round_ in range(options.rounds + 1):
            for name, bits, length, count in rows:
                found = sides[name].time_s(length, count, bits)
                if round_:  # the first warms up
                    seconds[name, bits, length, count].append(found)
        where = measured_on(threads=options.threads, rounds=options.rounds, model=rounded.engine.manifest.model.name)
        print(json.dumps(where))
        least = {row: min(times) for row, times in seconds.items()}
        print("| keys and values | bits | behind | token | of empty | prompt of 128 | of empty |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for (name, bits), length in product(lines, lengths):
            cells = []
            for count in (1, CHUNK):
                now, empty = (least[name, bits, at, count] for at in (length, EMPTY))
                cells.append(f"{1e3 * now:.2f} ms | {empty / now:.2f}")
            print(f"| {name} | {bits:g} | {length} | {' | '.join(cells)} |")
        for (name, bits), length in product(lines[:-1] if gguf is not None else (), lengths):
            ratio = least[RIVAL, RIVAL_BITS, length, 1] / least[name, bits, length, 1]
            print(f"a token behind {length}, {name}, {bits:g} bits: {ratio:.2f} x the speed of {RIVAL}")
        for name, side in own.items():
            for length, grown in side.context_bytes.items():
                computed = side.engine._backend.token_bytes * (length + CHUNK)
                print(f"{name}: a context of {length + CHUNK} takes {grown} bytes, computed {computed}")
        changed = {bits: divergence(exact, rounded, bits, options.kl_windows) for bits in budgets}
        for bits, figures in changed.items():
            print(f"{bits:g} bits: {json.dumps(figures)}")
        if options.json is not None:
            passes = [
                {"keys_and_values": name, "bits": bits, "behind": length, "tokens": count, "least_s": least[row]}
                for row in rows
                for name, bits, length, count in [row]
            ]
            options.json.write_text(json.dumps({**where, "passes": passes, "changed": changed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
