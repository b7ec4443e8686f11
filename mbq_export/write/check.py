"""The check of a written bundle: it must compute what the calibrated model computes.

The calibrated model was recorded with the very slices that the bundle holds (``model.recording``), so only the
lowering and the kernels lie between the two.  What runs where:

- The ONNX graph runs on ONNX Runtime.  A native graph uses the bundle's own library.  If this machine cannot run that
  library, the graph uses a library of the same kernels for this machine.
- A decoder of TVM runs where this machine can run it.
- GPU kernels do not run.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mbq_runtime.bundle.facts import by_shape
from mbq_runtime.bundle.isa import problem, this_machine
from mbq_runtime.bundle.layout import PORTABLE_LAYOUT
from mbq_runtime.bundle.manifest import Manifest
from mbq_runtime.bundle.slice_profile import CODE_BITS
from mbq_runtime.engine.imports import engine_errors, import_engine
from mbq_runtime.engine.private import ops_library
from mbq_runtime.engine.session import first_pass
from mbq_runtime.engine.threads import cores
from mbq_targets.machines import best_for

from ..check import fault, looser
from ..format.attention import cached_codes
from ..model.recording import (
    F32,
    LAST_TOKENS,
    Codes,
    Difference,
    Recording,
    check_prompt,
    difference,
    local_difference,
    local_errors,
    logits_difference,
    record_sliced,
    stream_readers,
)
from ..model.stop_tokens import stop_token_ids
from ..progress import staged
from . import files
from .engines import Work

LOCAL_LIMITS = {16: 5e-4, 8: 5e-3}
"""Largest relative error of what a part of a graph computes from given inputs, by the bits of activations.
Measurements are in docs/log.md."""

LIMITS = {16: 2e-3, 8: 0.15}
"""The same of the logits of a whole model, whose parts add up their errors."""

_SHAKEN_LIMIT = 1.5
"""With keys and values of 8 bits, limits rise by this many times what shaken queries change: two runs of the same model
differ, because numbers at the border of two codes get either."""

KV_LIMIT = 0.15
"""Largest relative change of the logits by keys and values of 8 bits."""

_ALL_SLICES = np.array([CODE_BITS, CODE_BITS], np.float32)
"""The input ``avg_bits`` of a pass at full depth."""
_REPLY = "bVQ7"
"""A reply that no template contains."""


def check_bundle(work: Work, manifest: Manifest) -> None:
    """Compare a written bundle with the model that it was made from.

    Args:
        work: what the bundle was written from, and its folder, in which all files are.
        manifest: of the bundle.

    Raises:
        ModelError: the bundle computes something else, or would not stop where the model does.
        BundleError: an engine cannot run it.
    """
    progress = staged(work.progress, "checking the bundle against the original")
    progress(0, len(manifest.engines))
    _check_stop(work)
    for i, engine in enumerate(manifest.engines):
        differs = None
        if engine == "onnx":
            differs = _onnx_difference(work, manifest)
        elif engine == "tvm" and problem(work.target, this_machine()) is None:
            differs = _tvm_difference(work, manifest)
        if differs is not None:
            raise fault(f"engine {engine} for {work.target.name} was lowered wrongly", str(differs))
        progress(i + 1, len(manifest.engines))


def _prompt(work: Work) -> NDArray[np.int64]:
    recorded = work.calibrated.recording
    return check_prompt(work.checkpoint, np.arange(256)) if recorded is None else recorded.prompt


def _rounded_recording(
    work: Work, cached: Codes | None, *, shaken: bool = False, given: Mapping[str, F32] | None = None
) -> Recording:
    """The recording of the calibrated model, with numbers rounded as the bundle rounds them.

    cached: the bundle's codes of keys and values, or None where they are in float32; shaken and given: see
    ``recording.record_sliced``.
    """
    calibrated = work.calibrated
    return record_sliced(
        work.checkpoint, {name: linear.sliced for name, linear in calibrated.units.items()}, calibrated.embedding,
        calibrated.profile, _prompt(work), per_layer=calibrated.per_layer,
        activation_bits=work.spec.activation_bits, cached=cached, shaken=shaken, given=given,
    )  # fmt: skip


def _whole_difference(work: Work, logits: F32, streams: Mapping[str, F32], *, rounded: bool) -> Difference | None:
    """Compare what a bundle computes with what was recorded of the calibrated model, whose numbers are not rounded.

    rounded: whether keys and values have 8 bits.
    """
    recorded, loose = work.calibrated.recording, looser(work.checkpoint.decoder)
    if recorded is None or work.spec.activation_bits != 16:
        return None
    differs = difference(recorded, logits, streams, limit=loose * (KV_LIMIT if rounded else LIMITS[16]))
    if differs is not None and rounded:
        raise fault("keys and values of 8 bits make it another model (--kv 32 does not round them)", str(differs))
    return differs


def _onnx_difference(work: Work, manifest: Manifest) -> Difference | None:
    with _runnable_graph(work, manifest) as (graph, library):
        return _graph_difference(work, graph, library)


def _graph_difference(work: Work, graph: Path, library: Path | None) -> Difference | None:
    """Compare a graph part by part: each part of the reference reads what the graph's part reads.

    library: of the graph's operators; None for stock operators, which have keys and values of float32.
    """
    prompt, rounded = _prompt(work), library is not None and work.spec.kv_bits == 8
    caches = {
        layer: [f"present.{layer}.{part}" for part in ("key", "value")]
        for layer in (work.checkpoint.decoder.caches if rounded else ())
    }
    places = list(stream_readers(work.checkpoint.decoder))
    with _with_streams(work, graph) as (shown, names):
        found = _run_onnx(shown, library, prompt, [*names, *(name for of in caches.values() for name in of)])
    given = dict(zip(places, (found[name] for name in names), strict=True))
    stored = {layer: (found[key], found[value]) for layer, (key, value) in caches.items()}
    codes = _codes(stored, len(prompt)) if rounded else None
    expected, logits = _rounded_recording(work, codes, given=given), found["all_logits"]
    streams = {place: values[-len(logits) :] for place, values in given.items()}
    limits = dict.fromkeys([*places, "head"], LOCAL_LIMITS[work.spec.activation_bits])
    if rounded:
        shaken = _rounded_recording(work, codes, shaken=True, given=given)
        for place, error in local_errors(expected, shaken.logits, shaken.streams).items():
            limits[place] += _SHAKEN_LIMIT * error
    differs = local_difference(expected, logits, streams, limits)
    return differs or _whole_difference(work, logits, streams, rounded=rounded)


def _codes(stored: Mapping[int, tuple[NDArray[np.uint8], NDArray[np.uint8]]], tokens: int) -> Codes:
    """The codes of the keys and values of blocks."""
    return {
        layer: (cached_codes(keys, tokens, keys=True), cached_codes(values, tokens, keys=False))
        for layer, (keys, values) in stored.items()
    }


@contextmanager
def _runnable_graph(work: Work, manifest: Manifest) -> Iterator[tuple[Path, Path | None]]:
    """A graph that this machine can run, and the library of its operators, while the block runs."""
    target, here = work.target, best_for(this_machine())
    if not target.native or problem(target, this_machine()) is None:
        yield work.folder / "model.onnx", ops_library(work.folder, manifest)
        return
    with tempfile.TemporaryDirectory(prefix=".check-", dir=work.folder) as scratch:
        if here.native:
            from mbq_targets.build import build_ops_library

            build_ops_library(here, work.spec, Path(scratch) / "here.so")
            yield work.folder / "model.onnx", Path(scratch) / "here.so"
        else:
            yield _portable_graph(work, Path(scratch)), None


def _portable_graph(work: Work, folder: Path) -> Path:
    """The model's graph in stock operators."""
    from ..lower.onnx import lower

    lowered = lower(work.checkpoint, work.calibrated, PORTABLE_LAYOUT, work.spec.activation_bits)
    files.write_model(lowered.model, lowered.tensors, folder)
    return folder / "model.onnx"


def _run_onnx(
    graph: Path, library: Path | None, prompt: NDArray[np.int64], more: Sequence[str] = ()
) -> dict[str, NDArray[Any]]:
    """``all_logits`` of the last tokens of the prompt, and more values of a graph, by their names in it."""
    onnxruntime = import_engine("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = cores()
    with engine_errors(f"{graph}: the check of the bundle failed"):
        if library is not None:
            options.register_custom_ops_library(str(library))
        session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        feeds: dict[str, NDArray[Any]] = {
            "input_ids": prompt[None],
            "avg_bits": _ALL_SLICES,
            "scored": np.array([min(LAST_TOKENS, len(prompt))], np.int64),
            **first_pass(session, len(prompt)),
        }
        names = ["all_logits", *more]
        return {name: value[0] for name, value in zip(names, session.run(names, feeds), strict=True)}


@contextmanager
def _with_streams(work: Work, graph: Path) -> Iterator[tuple[Path, list[str]]]:
    """A graph that puts out the residual stream at every place too, and the outputs' names, while the block runs."""
    model = onnx.load(str(graph), load_external_data=False)
    reader = re.compile(r"layers\.0\.(attn|conv|delta)_(norm|in(\.unbiased)?)")
    first_reader = next(node for node in model.graph.node if reader.fullmatch(node.name))
    d = work.checkpoint.decoder
    sums = [f"layers.{layer}.{part}_norm.sum" for layer in range(d.layers) for part in d.readers(layer)]
    names = [first_reader.input[0], *sums[1:], "final_norm.sum"]
    for name in names:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    # Beside the graph, where its tensors are.
    shown = graph.with_name(".streams.onnx")
    try:
        shown.write_bytes(model.SerializeToString())
        yield shown, names
    finally:
        shown.unlink(missing_ok=True)


def _tvm_difference(work: Work, manifest: Manifest) -> Difference | None:
    """Compare a decoder of TVM as a whole: it does not show its streams.

    Where it differs, the graph's parts tell whether both lowerings have the error.
    """
    logits, cached = _run_tvm(work, manifest)
    limit = LIMITS[work.spec.activation_bits] * looser(work.checkpoint.decoder)
    expected = _rounded_recording(work, cached)
    if cached is not None:
        shaken = _rounded_recording(work, cached, shaken=True)
        limit += _SHAKEN_LIMIT * logits_difference(expected.logits, shaken.logits)
        _whole_difference(work, expected.logits, expected.streams, rounded=True)
    differs = difference(expected, logits, {}, limit=limit)
    if differs is None and cached is None:
        differs = _whole_difference(work, logits, {}, rounded=False)
    if differs is None:
        return None
    with tempfile.TemporaryDirectory(prefix=".check-", dir=work.folder) as scratch:
        return _graph_difference(work, _portable_graph(work, Path(scratch)), None) or differs


def _run_tvm(work: Work, manifest: Manifest) -> tuple[F32, Codes | None]:
    """The logits of the last tokens, and the codes of keys and values where these have 8 bits."""
    from mbq_runtime.engine.tvm import Backend

    prompt = _prompt(work).astype(np.int32)
    last = min(LAST_TOKENS, len(prompt))
    with engine_errors(f"{work.folder}: the check of the bundle failed"):
        context = Backend(work.folder, manifest, cores()).start(len(prompt), _ALL_SLICES)
        # In passes of equal length, the last of which has the wanted logits.
        for end in range(len(prompt) % last or last, len(prompt) + 1, last):
            part = prompt[max(0, end - last) : end]
            context.append(part, len(part))
        logits = context.logits().copy()
    if work.spec.kv_bits == 32:
        return logits, None
    shapes, kept = by_shape(work.checkpoint.decoder.caches), context.kept(len(prompt))
    stored = {
        layer: (kept[2 * at][row], kept[2 * at + 1][row])
        for at, layers in enumerate(shapes.values())
        for row, layer in enumerate(layers)
    }
    return logits, _codes(stored, len(prompt))


def _check_stop(work: Work) -> None:
    """Refuse a bundle whose replies would not end where the model ends them."""
    checkpoint = work.checkpoint
    owners = [checkpoint.model.generation_config, checkpoint.tokenizer, checkpoint.model.config]
    rows = checkpoint.decoder.vocab_size
    wanted = {*stop_token_ids(checkpoint.tokenizer, owners, rows), *_closing_ids(checkpoint.tokenizer)}
    written = json.loads((work.folder / "genai_config.json").read_bytes())["model"]["eos_token_id"]
    if set(written if isinstance(written, list) else [written]) != wanted:
        raise fault(
            "replies would not end where they should",
            f"genai_config.json: eos_token_id is {written}; {sorted(wanted)} is needed",
        )


def _closing_ids(tokenizer: Any) -> list[int]:
    """The id of the added token that closes a reply in the chat template, found among the ids of a conversation."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _REPLY}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    # A template may refuse this conversation in any way it likes.
    except Exception:
        return []
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for at in range(len(ids) - 1, -1, -1):
        if _REPLY in tokenizer.decode(ids[at:]):
            return []
        if ids[at] in tokenizer.added_tokens_decoder and tokenizer.decode(ids[:at]).rstrip().endswith(_REPLY):
            return [ids[at]]
    return []
