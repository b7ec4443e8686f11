"""Bundles exported for arm64 boards: what they say on an emulated board is what the host's bundle says.

The bundles come from the fixtures ``smollm2_host_bundle``, ``smollm2_arm64_bundle`` (dot product
instructions) and ``smollm2_rpi4_bundle`` (none): one model, one calibration, three targets.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from agreement import LARGEST_DIFFERENCE, assert_agree
from forked_mbq import Ended, Mbq
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mbq_runtime.bundle.file_names import OPS_LIBRARY
from mbq_runtime.bundle.manifest import read
from mbq_runtime.engine import Engine, Session
from mbq_runtime.engine.session import first_pass
from mbq_runtime.errors import BundleError

pytestmark = pytest.mark.slow

# The core that stands for each target's boards: the least it may run on.
CORES = {"arm64": "cortex-a76", "rpi4": "cortex-a72"}
TARGETS = list(CORES)
Array = NDArray[Any]
Board = Callable[[str], Mbq]

PROMPT = "The history of the lighthouse begins"
REPLY_TOKENS = 12

TEXT = "A river delta forms where a stream meets still water."
# Given the same inputs, a layer's outputs agree this well, relative to the largest.
LAYER_TOLERANCE = 1e-5

WRITE_LOGITS = """
import json, sys
import numpy as np
from mbq_runtime.engine import Session
bundle, tokens, budgets, out = sys.argv[1:]
session = Session(bundle)
np.savez(out, **{bits: session.run(json.loads(tokens), float(bits)).logits for bits in json.loads(budgets)})
"""

ALONE = ".alone"
"""Behind the names of what our ops make without what stands before them."""

RUN_OPS = """
import sys
import numpy as np
import onnxruntime
model, library, *files = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(library)
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
names = [value.name for value in session.get_outputs()]
for inputs, outputs in zip(files[::2], files[1::2], strict=True):
    np.savez(outputs, **dict(zip(names, session.run(names, dict(np.load(inputs))), strict=True)))
"""


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def board_bundle(request: pytest.FixtureRequest, target: str) -> Path:
    return Path(request.getfixturevalue(f"smollm2_{target}_bundle"))


@pytest.fixture(scope="module")
def host_tokens(smollm2_host_bundle: Path, host: Mbq) -> list[int]:
    """The host bundle's greedy reply at 8 bits."""
    done = host(greedy(smollm2_host_bundle))
    assert done.code == 0, done.err
    reply = json.loads(done.out)
    assert len(reply["tokens"]) == REPLY_TOKENS
    return list(reply["tokens"])


@pytest.fixture(scope="module")
def text_tokens(smollm2_host_bundle: Path) -> list[int]:
    return list(Engine.load(smollm2_host_bundle).encode(TEXT, add_bos=True))


def greedy(bundle: Path) -> list[str | Path]:
    return ["run", bundle, PROMPT, "--raw", "--json", "--bits", "8", "--max-tokens", str(REPLY_TOKENS)]


def short_greedy(bundle: Path) -> list[str | Path]:
    return ["run", bundle, "1, 2, 3,", "--raw", "--json", "--bits", "8", "--max-tokens", "3"]


def assert_one_line_error(done: Ended, exit_code: int, *parts: str) -> None:
    assert done.code == exit_code, (done.code, done.err)  # a signal would be negative
    assert done.out == ""
    assert done.err.startswith("mbq: error: ")
    assert done.err.count("\n") == 1
    for part in parts:
        assert part in done.err


def test_greedy_reply_is_the_hosts(
    board: Board, target: str, board_bundle: Path, smollm2_host_bundle: Path, host_tokens: list[int]
) -> None:
    done = board(CORES[target])(greedy(board_bundle))
    assert done.code == 0, done.err
    reply = json.loads(done.out)
    tokens = list(reply["tokens"])
    print(f"\n{target} on {CORES[target]}: {reply['text']!r}, {reply['avg_bits_used']:.2f} bits")
    assert reply["avg_bits_used"] == pytest.approx(8.0, abs=1e-3)
    agreed = common_length(tokens, host_tokens)
    if agreed == REPLY_TOKENS:
        return
    # A difference is a fault unless the host itself could hardly tell the two tokens apart.
    before = [*Engine.load(smollm2_host_bundle).encode(PROMPT, add_bos=True), *host_tokens[:agreed]]
    logits = Session(smollm2_host_bundle).run(before, 8.0).logits[-1]
    best, second = np.argsort(logits)[-2:][::-1]
    lead = float(logits[best] - logits[second])
    print(f"replies part after {agreed} tokens; the best logit leads by {lead:.1e}")
    assert agreed < len(tokens), "the board's reply ends early"
    said = f"token {agreed}: board {tokens[agreed]}, host {host_tokens[agreed]}, lead {lead:.3g}"
    assert lead <= LARGEST_DIFFERENCE * np.abs(logits).max(), said
    assert {tokens[agreed], host_tokens[agreed]} == {int(best), int(second)}


def test_every_layer_gives_the_hosts_numbers(
    board: Board,
    target: str,
    board_bundle: Path,
    smollm2_host_bundle: Path,
    text_tokens: list[int],
    tmp_path: Path,
) -> None:
    """Routed matrices and embedding of the real model, each on the inputs it has on the host."""
    budgets = [f"{read(smollm2_host_bundle).budget.min_bits:g}", "4", "8"]
    whole, ops = write_probes(smollm2_host_bundle, tmp_path)
    library = smollm2_host_bundle / OPS_LIBRARY
    probe, host = open_session(whole, library), open_session(ops, library)
    expected: dict[str, dict[str, Array]] = {}
    files: list[Path] = []
    for bits in budgets:
        given = run_probe(probe, host, text_tokens, float(bits))
        names = [value.name for value in host.get_outputs()]
        expected[bits] = dict(zip(names, host.run(names, given), strict=True))
        files += [tmp_path / f"in-{bits}.npz", tmp_path / f"out-{bits}.npz"]
        np.savez(files[-2], **given)  # type: ignore[arg-type]
    done = board(CORES[target])([ops, board_bundle / OPS_LIBRARY, *files], program=RUN_OPS)
    assert done.code == 0, done.err
    for bits, outputs in zip(budgets, files[1::2], strict=True):
        worst = 0.0
        with np.load(outputs) as found:
            assert set(found) == set(expected[bits])
            for name, value in expected[bits].items():
                if value.dtype == np.int32:
                    assert np.array_equal(found[name], value), f"{name} at {bits} bits: another depth"
                    continue
                error = relative_error(found[name], value)
                worst = max(worst, error)
                assert error <= LAYER_TOLERANCE, f"{name} at {bits} bits"
        print(f"\n{target} on {CORES[target]} at {bits} bits: {len(expected[bits])} tensors, worst {worst:.1e}")


def write_probes(bundle: Path, folder: Path) -> tuple[Path, Path]:
    """Two models beside a link to the bundle's weights.

    The first is the bundle's with every input of our ops but attention as one more output; the second holds these
    alone, none behind another: inputs are what the first puts out, outputs are all that they make.
    """
    data = folder / "model.onnx.data"
    try:
        os.link(bundle / data.name, data)
    except OSError:  # another file system
        shutil.copyfile(bundle / data.name, data)
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    ours = []
    for node in graph.node:
        if node.domain == "ai.mbq" and node.op_type != "CachedAttention":
            ours.append(onnx.NodeProto.FromString(node.SerializeToString()))
            ours[-1].output[:] = [f"{name}{ALONE}" for name in node.output]
    made = [(name, TensorProto.INT32 if name.endswith(f".depth{ALONE}") else TensorProto.FLOAT)
            for node in ours for name in node.output]  # fmt: skip
    known = constants | {value.name for value in graph.input}
    given = list(dict.fromkeys(name for node in ours for name in node.input if name and name not in known))

    tensor = helper.make_tensor_value_info
    captured = [tensor(name, TensorProto.FLOAT, None) for name in given]
    used = {name for node in ours for name in node.input}
    alone = helper.make_graph(
        ours,
        "ops",
        [*captured, *(value for value in graph.input if value.name in used)],
        [tensor(name, kind, None) for name, kind in made],
        [constant for constant in graph.initializer if constant.name in used],
    )
    paths = folder / "whole.onnx", folder / "ops.onnx"
    graph.output.extend(captured)
    onnx.save(model, paths[0])
    onnx.save(helper.make_model(alone, opset_imports=model.opset_import, ir_version=model.ir_version), paths[1])
    return paths


def open_session(model: Path, library: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def run_probe(
    whole: onnxruntime.InferenceSession, ops: onnxruntime.InferenceSession, tokens: list[int], bits: float
) -> dict[str, Array]:
    """The inputs of ``ops`` as they are in ``whole`` when it reads ``tokens`` at a budget."""
    feeds: dict[str, Array] = {
        "input_ids": np.array([tokens], np.int64),
        "avg_bits": np.array([bits, 8], np.float32),
        "scored": np.array([len(tokens)], np.int64),
        **first_pass(whole, len(tokens)),
    }
    names = [value.name for value in ops.get_inputs() if value.name not in feeds]
    found = dict(zip(names, whole.run(names, feeds), strict=True))
    available = feeds | found
    return {value.name: available[value.name] for value in ops.get_inputs()}


def test_logits_are_the_hosts(
    board: Board,
    target: str,
    board_bundle: Path,
    smollm2_host_bundle: Path,
    text_tokens: list[int],
    tmp_path: Path,
) -> None:
    """At the lowest depth, in the middle and at full depth, at every position of a text."""
    budgets = [f"{read(smollm2_host_bundle).budget.min_bits:g}", "4", "8"]
    out = tmp_path / "board.npz"
    arguments = [board_bundle, json.dumps(text_tokens), json.dumps(budgets), out]
    done = board(CORES[target])(arguments, program=WRITE_LOGITS)
    assert done.code == 0, done.err
    session = Session(smollm2_host_bundle)
    with np.load(out) as found:
        assert set(found) == set(budgets)
        for bits in budgets:
            expected = session.run(text_tokens, float(bits)).logits
            assert_agree(found[bits], expected, f"{target} on {CORES[target]} at {bits} bits")


def common_length(a: list[int], b: list[int]) -> int:
    """How many leading elements are the same."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def relative_error(a: Array, b: Array) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def test_dot_product_bundle_is_refused_by_a_core_without(board: Board, smollm2_arm64_bundle: Path) -> None:
    """One line before the library is opened, not the signal of an unknown instruction."""
    assert "asimddp" in read(smollm2_arm64_bundle).target.features
    done = board("cortex-a72")(greedy(smollm2_arm64_bundle))
    assert_one_line_error(done, BundleError.exit_code, "asimddp", "arm64", "aarch64")


def test_rpi4_bundle_needs_no_dot_product_and_runs_on_newer_cores(board: Board, smollm2_rpi4_bundle: Path) -> None:
    assert "asimddp" not in read(smollm2_rpi4_bundle).target.features
    done = board("cortex-a76")(short_greedy(smollm2_rpi4_bundle))
    assert done.code == 0, done.err
    assert json.loads(done.out)["text"] == " 4,"


def test_portable_bundle_runs_on_a_board(board: Board, smollm2_portable_bundle: Path) -> None:
    """Stock operators only."""
    done = board("cortex-a76")(short_greedy(smollm2_portable_bundle))
    assert done.code == 0, done.err
    assert json.loads(done.out)["text"] == " 4,"


def test_board_bundle_is_refused_by_the_host(host: Mbq, target: str, board_bundle: Path) -> None:
    if os.uname().machine == "aarch64":
        pytest.skip("the host is an arm64 machine itself")
    done = host(greedy(board_bundle))
    assert_one_line_error(done, BundleError.exit_code, target, "aarch64", os.uname().machine)


def test_board_bundle_verifies_on_the_board(board: Board, target: str, board_bundle: Path) -> None:
    done = board(CORES[target])(["verify", board_bundle])
    assert done.code == 0, done.err
    assert "note:" not in done.out  # it runs here
