"""The sides of a comparison: one row for each method, which yields its sides one after the other."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mbq_export.model.checkpoint import Checkpoint
from mbq_export.model.shape import Decoder
from mbq_runtime import perplexity
from mbq_runtime.bundle.slice_profile import CODE_BITS
from mbq_runtime.engine import Window
from mbq_runtime.engine.load import open_bundle
from mbq_runtime.engine.session import Session
from mbq_runtime.errors import BundleError, UsageError

from . import weights
from .harness import Forward, Side

FP_BITS = 32


@dataclass(frozen=True)
class Bench:
    """What every method is given.

    checkpoint: the model; calibration: int64 [windows, context] tokens; group_size: weights per scale; bits: of
    fixed-width methods; bundle: a folder to measure, or None; avg_bits: budgets of the bundle; seed: of random numbers;
    folder: for files.
    """

    checkpoint: Checkpoint
    calibration: NDArray[np.int64]
    group_size: int
    bits: tuple[int, ...]
    bundle: Path | None
    avg_bits: tuple[float, ...]
    seed: int
    folder: Path


@dataclass(frozen=True)
class Method:
    """A way to store the model.

    title: its name in the table; sides: yields each side while its weights are in the model; needs: (module,
    package) of a library that the export extra does not install, or None; experts: whether it takes models with
    experts.
    """

    title: str
    sides: Callable[[Bench], Iterator[Side]]
    needs: tuple[str, str] | None = None
    experts: bool = False

    @property
    def available(self) -> bool:
        """Whether the library is installed."""
        return self.needs is None or importlib.util.find_spec(self.needs[0]) is not None


def reference(bench: Bench) -> Side:
    """The float32 model.

    Args:
        bench: what every method is given.
    """
    layers = weights.Layers.of(bench.checkpoint)
    block = 4 * weights.count(bench.checkpoint, layers.blocks)
    head = 4 * weights.count(bench.checkpoint, [layers.head])
    forward = weights.forward(bench.checkpoint, FP_BITS)
    return Side("fp32", "fp32", FP_BITS, lambda _: block + head, block, "32 bits", forward)


def _with_blocks(
    bench: Bench, method: str, bits: int, blocks: Mapping[str, torch.Tensor], block_bytes: int
) -> Iterator[Side]:
    """A side with quantised blocks and a float16 head, as the files of these methods have it.

    A second side has a head of ``bits`` bits, rounded to nearest, as the bundle's head has few bits.
    """
    checkpoint = bench.checkpoint
    name = weights.Layers.of(checkpoint).head
    size = weights.count(checkpoint, [name])
    small = weights.rounded_bytes(size, bits, bench.group_size)
    own = checkpoint.linear(name).weight
    rounded = weights.round_to_nearest(own, bits, bench.group_size)
    title = f"{METHODS[method].title}, {bits} bits"
    with weights.swapped(checkpoint, blocks):
        for more, head, stored, kind in (
            ("", own, weights.HALF_BYTES * size, "16 bits"),
            (", and the head", rounded, small, f"{8 * small / size:.3g} bits"),
        ):
            with weights.head_swapped(checkpoint, head):
                yield Side(
                    method,
                    title + more,
                    bits,
                    lambda _, size=block_bytes + stored: size,  # type: ignore[misc]
                    block_bytes,
                    kind,
                    weights.forward(checkpoint, bits),
                )


def _rtn(bench: Bench) -> Iterator[Side]:
    checkpoint, group_size = bench.checkpoint, bench.group_size
    names = weights.Layers.of(checkpoint).blocks
    size = weights.count(checkpoint, names)
    for bits in bench.bits:
        blocks = {n: weights.round_to_nearest(checkpoint.linear(n).weight, bits, group_size) for n in names}
        yield from _with_blocks(bench, "rtn", bits, blocks, weights.rounded_bytes(size, bits, group_size))


def _library(method: str) -> Callable[[Bench], Iterator[Side]]:
    def sides(bench: Bench) -> Iterator[Side]:
        from . import libraries
        from .library_worker import Request

        folder = bench.folder / method
        folder.mkdir()
        libraries.write_inputs(bench.checkpoint, bench.calibration, folder)
        for bits in bench.bits:
            request = Request(method, bits, bench.group_size, bench.seed)
            blocks, sizes = libraries.quantise(request, folder)
            yield from _with_blocks(bench, method, bits, blocks, sum(sizes.values()))

    return sides


def _llama_cpp(bench: Bench) -> Iterator[Side]:
    from . import llama_cpp_files as files

    checkpoint = bench.checkpoint
    layers = weights.Layers.of(checkpoint)
    head_module = "model.embed_tokens" if checkpoint.decoder.tied else layers.head
    source, out = bench.folder / "float32.gguf", bench.folder / "quantised.gguf"
    files.write_float32(checkpoint, source)
    importance = files.importance(checkpoint, bench.calibration)
    for file_type in files.FILE_TYPES:
        files.quantise(source, file_type, out, importance)
        found, sizes = files.read_weights(out, checkpoint)
        block = sum(sizes[name] for name in layers.blocks)
        head = sizes[head_module]
        head_bits = 8 * head / weights.count(checkpoint, [layers.head])
        # A tied head is the embedding's own tensor, so it changes with it.
        with weights.swapped(checkpoint, found):
            yield Side(
                "llama.cpp",
                f"llama.cpp {file_type}",
                None,
                lambda _, size=block + head: size,  # type: ignore[misc]
                block,
                f"{head_bits:.3g} bits",
                weights.forward(checkpoint, 8 * block / weights.count(checkpoint, layers.blocks)),
            )


def _bundle(bench: Bench) -> Iterator[Side]:
    if bench.bundle is None:
        return
    session = Session(bench.bundle)
    sizes = {float(bits): size for bits, size in session.manifest.weights.bytes_per_token.items()}
    for bits in bench.avg_bits:
        yield Side(
            "bundle",
            f"bundle, {bits:g} bits on average",
            bits,
            lambda used: round(float(np.interp(used, list(sizes), list(sizes.values())))),
            None,
            "routed" if bits < CODE_BITS else f"{CODE_BITS} bits",
            held(session, bits),
        )


def check_bundle(bundle: Path, decoder: Decoder, name: str, avg_bits: Sequence[float]) -> None:
    """Refuse a bundle that cannot be measured beside a model.

    Args:
        bundle: its folder.
        decoder: shape of the model.
        name: of the model.
        avg_bits: budgets to measure it at, in average bits per weight.

    Raises:
        BundleError: the bundle is broken, not for this machine, or has no ONNX graph.
        UsageError: it is of another model, or does not have a budget.
    """
    folder, manifest = open_bundle(bundle, None)
    facts = manifest.model
    if (facts.layers, facts.hidden_size, facts.vocab_size) != (decoder.layers, decoder.hidden_size, decoder.vocab_size):
        raise UsageError(f"{bundle}: a bundle of {facts.name}, not of {name}; give a bundle of this model")
    if "onnx" not in manifest.engines:
        raise BundleError(f"{folder}: the bundle has no ONNX graph; export it again with --engine onnx")
    for bits in avg_bits:
        manifest.budget.check(bits, str(bundle))


def held(session: Session, avg_bits: float) -> Forward:
    """A bundle at a budget that is held from window to window, as an engine holds it from token to token.

    Args:
        session: the bundle.
        avg_bits: average bits per weight to hold.
    """

    def run(tokens: Sequence[int], bits: float) -> tuple[Window, float]:
        window = session.run(tokens, bits)
        return window, window.avg_bits_used

    scored = perplexity.held(run, avg_bits, session.manifest.budget)
    return lambda tokens: scored(tokens)[0]


METHODS = {
    "rtn": Method("round to nearest", _rtn, experts=True),
    "gptq": Method("GPTQ", _library("gptq"), ("gptqmodel", "gptqmodel")),
    "autoround": Method("AutoRound", _library("autoround"), ("auto_round", "auto-round")),
    "llama.cpp": Method("llama.cpp", _llama_cpp, ("llama_cpp", "llama-cpp-python")),
    "bundle": Method("bundle", _bundle, experts=True),
}
