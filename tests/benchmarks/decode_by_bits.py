"""Time of one decoded token by budget, beside the same decoder with stock 4-bit, 8-bit and float32 linears.

All sides run the same graph of SmolLM2-135M's shape (random weights) on ONNX Runtime, one token a
step with a filled cache; only the linear layers differ: routed sliced matmuls, MatMulNBits, MatMul.
Sides take turns within one run.  Prints the machine, a table of medians and quartiles, and raw JSON
on request:

    python tests/benchmarks/decode_by_bits.py [--slices 2,2,2,2] [--threads 2] [--rounds 60] [--json FILE]
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import click
import numpy as np
import onnx
import onnxruntime as ort
import torch
from measured_on import measured_on
from onnx import helper
from transformers import LlamaConfig, LlamaForCausalLM

from mbq_export.calibrated import Calibrated, RoutedLinear
from mbq_export.format.router import RouterParams
from mbq_export.lower.onnx import lower
from mbq_export.lower.onnx_text import DOMAIN
from mbq_export.model.checkpoint import Checkpoint
from mbq_export.model.describe import describe
from mbq_export.model.shape import Unit
from mbq_export.model.source import ModelSource
from mbq_export.routing import thresholds
from mbq_export.slicing import rtn
from mbq_export.write import files
from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_targets.build import build_ops_library
from mbq_targets.machines import resolve
from mbq_targets.spec import KernelSpec

GROUP_SIZE = 64
PAST_TOKENS = 64
SHAPE: dict[str, Any] = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "max_position_embeddings": 2048,
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def random_model(profile: SliceProfile) -> tuple[Checkpoint, Calibrated]:
    """SmolLM2-135M's shape with random weights; routers that give every token the depth of the budget."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"])
    checkpoint = Checkpoint(
        ModelSource("random", "", None), describe(config, "random"), LlamaForCausalLM(config).eval(), None
    )
    steps = profile.depths - 1
    budgets = thresholds.budgets(profile)
    # A slice passes when the bits it leads to are within the budget.
    bias = 0.5 - np.asarray(profile.depth_bits[1:], np.float32)
    router = RouterParams(bias, np.zeros(steps, np.float32), budgets, -budgets)

    def routed(unit: Unit) -> RoutedLinear:
        return RoutedLinear(unit, rtn.slice_unit(checkpoint, unit, GROUP_SIZE, profile), None, router)

    units = {unit.name: routed(unit) for unit in checkpoint.decoder.units()}
    scale = np.ones(checkpoint.decoder.hidden_size, np.float32)
    return checkpoint, Calibrated(profile, GROUP_SIZE, "norm", units, None, scale)


def stock_linear(node: onnx.NodeProto, bits: int, tensors: dict[str, Any], rng: np.random.Generator) -> onnx.NodeProto:
    """The stock node of the same shape: MatMul for 32 bits, else MatMulNBits with int8 activations."""
    shape = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    n, k = shape["N"], shape["K"]
    name = f"{node.name}.stock"
    if bits == 32:
        tensors[name] = rng.standard_normal((k, n), np.float32)
        return helper.make_node("MatMul", [node.input[0], name], node.output[:1])
    groups = k // GROUP_SIZE
    tensors[name] = rng.integers(0, 256, (n, groups, GROUP_SIZE * bits // 8), np.uint8)
    tensors[f"{name}.scale"] = rng.random((n, groups), np.float32)
    return helper.make_node(
        "MatMulNBits", [node.input[0], name, f"{name}.scale"], node.output[:1], domain="com.microsoft",
        N=n, K=k, bits=bits, block_size=GROUP_SIZE, accuracy_level=4,
    )  # fmt: skip


def stock_gate(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    gate, up, active = (f"{node.name}.{part}" for part in ("gate", "up", "active"))
    return [
        helper.make_node("Split", node.input, [gate, up], axis=-1, num_outputs=2),
        helper.make_node("QuickGelu", [gate], [active], domain="com.microsoft", alpha=1.0),
        helper.make_node("Mul", [active, up], node.output),
    ]


def stock_model(model: onnx.ModelProto, tensors: dict[str, Any], bits: int) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """``model`` with stock linears, no routers and a plain embedding: what a fixed-precision export runs."""
    rng = np.random.default_rng(0)
    out, used = copy.deepcopy(model), dict(tensors)
    del out.graph.node[:]
    for node in model.graph.node:
        if node.op_type == "RoutedMatMul":
            out.graph.node.append(stock_linear(node, bits, used, rng))
        elif node.op_type == "SlicedGather":
            used["table"] = rng.standard_normal((SHAPE["vocab_size"], SHAPE["hidden_size"]), np.float32)
            out.graph.node.append(helper.make_node("Gather", ["table", node.input[0]], node.output))
        elif node.op_type == "GatedSilu":
            out.graph.node.extend(stock_gate(node))
        elif node.domain != DOMAIN:
            out.graph.node.append(node)
    reachable = {"logits"} | {o.name for o in out.graph.output if o.name.startswith("present")}
    kept = []
    for node in reversed(out.graph.node):
        if reachable & set(node.output):
            kept.append(node)
            reachable |= set(node.input)
    del out.graph.node[:]
    out.graph.node.extend(reversed(kept))
    for values, dropped in ((out.graph.output, "avg_bits_used"), (out.graph.output, "all_logits"),
                            (out.graph.input, "avg_bits"), (out.graph.input, "scored")):  # fmt: skip
        values.remove(next(v for v in values if v.name == dropped))
    return out, {name: value for name, value in used.items() if name in reachable}


def open_session(folder: Path, threads: int, library: Path | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(str(folder / "model.onnx"), options)


def feed(session: ort.InferenceSession, avg_bits: float) -> dict[str, Any]:
    values: dict[str, Any] = {
        "input_ids": np.array([[7]], np.int64),
        "attention_mask": np.ones((1, PAST_TOKENS + 1), np.int64),
        "avg_bits": np.array([avg_bits, 8], np.float32),
        "scored": np.zeros(1, np.int64),
    }
    rng = np.random.default_rng(1)
    past = (1, SHAPE["num_key_value_heads"], PAST_TOKENS, SHAPE["head_dim"])
    for item in session.get_inputs():
        if item.name.startswith("past"):
            values[item.name] = rng.standard_normal(past, np.float32)
    names = {item.name for item in session.get_inputs()}
    return {name: value for name, value in values.items() if name in names}


@click.command()
@click.option("--slices", default="2,2,2,2")
@click.option("--threads", default=2)
@click.option("--rounds", default=60)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(slices: str, threads: int, rounds: int, json_file: Path | None) -> None:
    """See the module's docstring."""
    profile = SliceProfile.parse(slices)
    checkpoint, calibrated = random_model(profile)
    model, tensors, _ = lower(checkpoint, calibrated, "mbq16")
    sides: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, bits in (("MatMulNBits 4 bits", 4), ("MatMulNBits 8 bits", 8), ("MatMul float32", 32)):
            folder = Path(scratch) / str(bits)
            folder.mkdir()
            files.write_model(*stock_model(model, tensors, bits), folder)
            session = open_session(folder, threads, None)
            sides[name] = (session, feed(session, 0))
        library = Path(scratch) / "libmbq_ops.so"
        build_ops_library(resolve("host"), KernelSpec(profile, GROUP_SIZE), library)
        files.write_model(model, tensors, Path(scratch))
        session = open_session(Path(scratch), threads, library)
        for bits in profile.depth_bits:
            values = feed(session, bits)
            used = float(session.run(["avg_bits_used"], values)[0][0])
            if abs(used - bits) > 1e-3:
                raise SystemExit(f"asked for {bits} bits, the graph used {used}")
            sides[f"sliced {bits} bits"] = (session, values)
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, (session, values) in sides.items():
                time.sleep(0.05)  # the threads of the side before spin for a while
                session.run(["logits"], values)  # warms the cache again
                start = time.perf_counter()
                session.run(["logits"], values)
                times[name].append((time.perf_counter() - start) * 1e3)
    facts = measured_on(threads=threads, target=resolve("host").name)
    print(" ".join(f"{key}={value}" for key, value in facts.items()))
    slowest = statistics.median(times["MatMul float32"])
    print(f"{'linears':20} {'ms/token':>9} {'quartiles':>15} {'tokens/s':>9} {'x float32':>9}")
    for name, found in times.items():
        low, median, high = statistics.quantiles(found, n=4)
        print(f"{name:20} {median:9.2f} {low:7.2f}-{high:<7.2f} {1e3 / median:9.1f} {slowest / median:9.2f}")
    if json_file is not None:
        json_file.write_text(json.dumps({"environment": facts, "slices": slices, "ms_per_token": times}, indent=1))


if __name__ == "__main__":
    main()
