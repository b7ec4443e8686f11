"""The check of the whole: every export compares what goes in with what comes out.

One model has four forms on its way: the checkpoint as it was loaded, the checkpoint with transformed weights, the
same with sliced weights, and the bundle.  Each form is run on one prompt and compared with the one before:

1. transformed against loaded: a rotation or a smoothing changes nothing, so the limit is small;
2. sliced against loaded, at full depth: rounding and tuning change a little, so the limit is wide;
3. bundle against sliced: both have the same weights, so the limit is small again.

The third comparison finds what a lowering gets wrong: rotary frequencies, windows, norm offsets, scales, biases,
activations, heads.  It runs the graph of engine ``onnx`` for every target, by kernels compiled for this machine.  Of
engine ``tvm``, where the bundle can run here, only the likeliest token behind the prompt is compared.  GPU plans are
not run.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mbq_runtime.bundle.manifest import OPS_LIBRARY
from mbq_runtime.bundle.slice_profile import CODE_BITS
from mbq_runtime.errors import ModelError

from .model.recording import F32, Recording, difference, logits_difference
from .model.stop_tokens import stop_token_ids

if TYPE_CHECKING:
    from mbq_targets.machines import Target
    from mbq_targets.spec import KernelSpec

    from .model.checkpoint import Checkpoint
    from .model.families import Decoder

SAME_LIMIT = 1e-3
"""Relative error of logits by float32 arithmetic in another order.  Small models have 1e-6."""

SLICED_LIMIT = 0.5
"""Of sliced against loaded logits.  Rounding random weights leaves 0.02 to 0.05, tuning them up to 0.3; another head or
another family leaves 1 and more."""

LOWERED_LIMIT = {16: 1e-2, 8: 0.15}
"""Of bundle against sliced logits, by the bits of activations.  Small models and SmolLM2-135M have 1e-4 and 0.01."""

_SCORED = "scored"


@dataclass(frozen=True)
class Written:
    """A bundle's draft that is to be checked.

    folder: the draft; target: the machine it is for; spec: what its kernels are compiled for.
    """

    folder: Path
    target: Target
    spec: KernelSpec


def check_transformed(original: Recording, transformed: Recording) -> None:
    """Compare the checkpoint before and behind its transforms.

    Args:
        original: of the checkpoint as it was loaded.
        transformed: of the checkpoint with transformed weights.

    Raises:
        ModelError: they differ.
    """
    found = difference(original, transformed.logits, transformed.streams, limit=SAME_LIMIT, rotated=True)
    if found is not None:
        raise _fault("the weights were transformed wrongly", str(found))


def check_sliced(original: Recording, sliced: Recording) -> None:
    """Compare the sliced model at full depth with the checkpoint as it was loaded.

    Args:
        original: of the checkpoint as it was loaded.
        sliced: of the model with sliced weights.

    Raises:
        ModelError: they differ by more than rounding and tuning can explain.
    """
    error = logits_difference(original.logits, sliced.logits)
    if not error <= SLICED_LIMIT:
        raise _fault(
            "the sliced model is another model",
            f"at 8 bits its logits are off by {error:.3g} of their size, {SLICED_LIMIT} is the limit",
        )


def check_written(written: Written, checkpoint: Checkpoint, expected: Recording) -> None:
    """Compare a written bundle with the sliced model that it was lowered from.

    Args:
        written: the bundle's draft.
        checkpoint: the model, for its description and its tokens.
        expected: of the model with sliced weights.

    Raises:
        ModelError: they differ.
    """
    _check_stop_tokens(written.folder, checkpoint)
    if (written.folder / "model.onnx").is_file():
        _check_onnx(written, checkpoint.decoder, expected)


def check_tvm(written: Written, expected: Recording) -> None:
    """Compare the token that engine ``tvm`` says behind the prompt.  Nothing is done where it cannot run here.

    Args:
        written: the bundle's draft, with its manifest.
        expected: of the model with sliced weights.

    Raises:
        ModelError: it is not the likeliest.
    """
    from mbq_runtime import Engine

    if not _runs_here(written.target) or len(expected.prompt) < 2:
        return
    # The prompt's last token is left out, so that the reply fits a context that the prompt fills.
    engine = Engine.load(written.folder, engine="tvm", threads=1)
    reply = engine.generate(expected.prompt[:-1].tolist(), max_tokens=1, avg_bits=float(CODE_BITS), temperature=0.0)
    reply.text()
    token, logits = reply.stats.tokens[0], expected.logits[-2]
    if logits.max() - logits[token] > LOWERED_LIMIT[written.spec.activation_bits] * logits.std() * 10:
        raise _fault(
            "the library of engine tvm was lowered wrongly",
            f"behind the prompt it says token {token}; {int(logits.argmax())} is the likeliest",
        )


def _runs_here(target: Target) -> bool:
    from mbq_runtime.bundle.isa import this_machine

    machine = this_machine()
    return target.native and target.arch == machine.arch and machine.features.issuperset(target.features)


def _check_stop_tokens(folder: Path, checkpoint: Checkpoint) -> None:
    owners = [checkpoint.model.generation_config, checkpoint.tokenizer, checkpoint.model.config]
    wanted = stop_token_ids(checkpoint.tokenizer, owners, checkpoint.decoder.vocab_size)
    found = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["eos_token_id"]
    found = found if isinstance(found, list) else [found]
    if sorted(found) != sorted(wanted):
        raise _fault("replies would not end where they should", f"eos_token_id is {found}; {wanted} is needed")


def _check_onnx(written: Written, decoder: Decoder, expected: Recording) -> None:
    limit = LOWERED_LIMIT[written.spec.activation_bits]
    with tempfile.TemporaryDirectory() as name:
        library = _ops_library(written, Path(name))
        logits, _ = _run_graph(written.folder / "model.onnx", library, expected, {})
        if difference(expected, logits, {}, limit=limit) is None:
            return
        # Once more, with the residual stream behind every place, to name the first that differs.
        shown = _stream_names(written.folder / "model.onnx", decoder)
        logits, streams = _run_graph(written.folder / "model.onnx", library, expected, shown)
    found = difference(expected, logits, streams, limit=limit)
    assert found is not None
    raise _fault("the graph was lowered wrongly", str(found))


def _ops_library(written: Written, folder: Path) -> Path | None:
    """The library of the graph's operators for this machine; None for a graph of stock operators."""
    from mbq_runtime.bundle.isa import this_machine
    from mbq_targets.build import build_ops_library
    from mbq_targets.machines import best_for

    if not written.target.native:
        return None
    if _runs_here(written.target):
        return written.folder / OPS_LIBRARY
    here = best_for(this_machine())
    library = folder / "libmbq_ops.so"
    build_ops_library(here, written.spec, library)
    return library


def _run_graph(
    path: Path, library: Path | None, expected: Recording, shown: Mapping[str, str]
) -> tuple[F32, dict[str, F32]]:
    """Logits, and tensors of the graph, at the last tokens of the prompt.

    shown: names of tensors [1, tokens, hidden], by place.
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    beside = path.with_name("check.onnx")
    if shown:
        model = onnx.load(path, load_external_data=False)
        known = {output.name for output in model.graph.output}
        for name in dict.fromkeys(shown.values()):
            if name not in known:
                model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
        beside.write_bytes(model.SerializeToString())
    try:
        session = onnxruntime.InferenceSession(str(beside if shown else path), options, ["CPUExecutionProvider"])
        feeds = _feeds(session, expected)
        logits, *streams = session.run(["all_logits", *shown.values()], feeds)
    finally:
        beside.unlink(missing_ok=True)
    last = len(expected.logits)
    return logits[0], {place: stream[0, -last:] for place, stream in zip(shown, streams, strict=True)}


def _feeds(session: object, expected: Recording) -> dict[str, NDArray[np.generic]]:
    tokens = expected.prompt
    past = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()  # type: ignore[attr-defined]
        if value.name.startswith("past_key_values.")
    }
    return {
        "input_ids": tokens[None],
        "attention_mask": np.ones((1, len(tokens)), np.int64),
        "avg_bits": np.array([CODE_BITS], np.float32),
        _SCORED: np.array([len(expected.logits)], np.int64),
        **past,
    }


def _stream_names(path: Path, decoder: Decoder) -> dict[str, str]:
    """The graph's tensors that hold the residual stream, by the place that writes it, as in ``Recording.streams``."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    made = {output for node in model.graph.node for output in node.output}
    found = {"embedding": "embedding.scaled" if "embedding.scaled" in made else "embedding"}
    for layer in range(decoder.layers):
        after = "final_norm" if layer + 1 == decoder.layers else f"layers.{layer + 1}.attn_norm"
        found[f"layers.{layer} attention"] = f"layers.{layer}.mlp_norm.sum"
        found[f"layers.{layer} MLP"] = f"{after}.sum"
    return found


def _fault(what: str, found: str) -> ModelError:
    return ModelError(f"the check of the export failed: {what}; {found}; no bundle was written: report this model")
