"""Prepares the folders ``op_check`` runs: small models of one op each, inputs, expected outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mbq_export.format.attention import Heads, cached_attention, put_rows
from mbq_export.format.codes import F32, F64, I32, Sliced, decode
from mbq_export.format.experts import experts_matmul
from mbq_export.format.ops import gated_gelu, gated_silu, round_activations, sliced_gather, sliced_matmul
from mbq_export.format.planes import pack_matrix
from mbq_export.format.router import RouterParams, route, router_scores, threshold_at
from mbq_runtime.bundle.layout import KV_SCALE_BYTES
from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_targets.constants import FEW_TOKENS, WEIGHT_STEPS
from mbq_targets.spec import KernelSpec

# Float32 accumulation may stray by this much of the sum of |terms|, the offsets' and the codes' terms apart.
RELATIVE = 1e-6
ATTENTION = 1 / WEIGHT_STEPS
"""Of the largest value. A weight at the border between two steps may get either."""
DICTATED_WIDTH = 32

Inputs = Mapping[str, tuple[int, Sequence[Any]]]  # name: (element type, shape)
Runs = list[dict[str, dict[str, Any]]]


def op_model(
    op: str,
    inputs: Inputs,
    constants: dict[str, Any],
    out: tuple[int, Sequence[Any]],
    **attrs: Any,
) -> onnx.ModelProto:
    """A model with one node of domain ai.mbq; constants {name: array}, output y."""
    node = helper.make_node(op, [*inputs, *constants], ["y"], name=f"{op}_node", domain="ai.mbq", **attrs)
    graph = helper.make_graph(
        [node],
        "case",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info("y", *out)],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.mbq", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def weight(rng: np.random.Generator, n: int, k: int, group: int, depths: int = 4) -> Sliced:
    """A sliced random weight.  Codes, scales and zeros take all values; one group has scale 0, one row factor 0."""
    codes = rng.integers(0, 256, (n, k), dtype=np.uint8)
    scales, zeros = (rng.integers(0, 256, (n, k // group), dtype=np.uint8) for _ in range(2))
    rows = rng.uniform(0.01, 0.1, (n, depths)).astype(np.float16)
    scales[n // 2, 0] = 0
    rows[n // 3] = 0
    return Sliced(codes, scales, zeros, rows)


def stored(sliced: Sliced, profile: SliceProfile) -> dict[str, Any]:
    """The constant inputs of a sliced op."""
    return pack_matrix(sliced, profile)


def dictating(depths: int) -> RouterParams:
    """A router of the norm rule that gives the rows of ``dictated`` their depths."""
    steps = np.arange(depths - 1, dtype=np.float32)
    ends, nothing = np.array([0, 16], np.float32), np.zeros(2, np.float32)
    return RouterParams(-(steps + 0.5), np.ones_like(steps), budgets=ends, thresholds=nothing)


def dictated(depth: I32) -> dict[str, Any]:
    """The inputs routed_by and avg_bits with which a router of ``dictating`` chooses these depths, [...]."""
    rows = np.exp((depth.astype(np.float32) - 1) / 2)  # the logarithm of the mean square is depth - 1
    return {"routed_by": np.repeat(rows[..., None], DICTATED_WIDTH, axis=-1), "avg_bits": np.array([1, 8], np.float32)}


def matmul_model(sliced: Sliced, profile: SliceProfile, constants: dict[str, Any], **changes: Any) -> onnx.ModelProto:
    """A node RoutedMatMul whose depths are ``dictated``."""
    return routed_model(sliced, profile, dictating(profile.depths), DICTATED_WIDTH, constants, **changes)


def activations(rng: np.random.Generator, tokens: int, k: int, group: int) -> F32:
    """Random rows; every third has outliers, every fourth a group of zeros."""
    x = rng.standard_normal((tokens, k)).astype(np.float32)
    x[::3, rng.integers(k)] *= 300
    x[1::3, rng.integers(k, size=4)] = -40
    x[::4, group : 2 * group] = 0
    return x


def term_sizes(sliced: Sliced, profile: SliceProfile, depth: int) -> F64:
    """|offset| + |w - offset| per weight, float64 [N, K]."""
    offset = np.repeat(sliced.offset_at(depth).astype(np.float64), sliced.group_size, axis=1)
    return np.asarray(np.abs(offset) + np.abs(decode(sliced, profile, depth) - offset))


def matmul_tolerance(x: F32, depth: I32, sliced: Sliced, spec: KernelSpec) -> F64:
    """How far each output of rows [M, K] at depths [M] may stray, float64 [M, N]."""
    sizes = np.abs(round_activations(x, sliced.group_size, spec.activation_bits))
    allowed = [s @ term_sizes(sliced, spec.profile, int(d)).T for s, d in zip(sizes, depth, strict=True)]
    return RELATIVE * np.array(allowed).reshape(len(x), len(sliced.codes))


def matmul_runs(rng: np.random.Generator, sliced: Sliced, spec: KernelSpec) -> Runs:
    """One token at every depth, then passes of few tokens and of many: mixed depths, and one depth.

    A pass of few tokens gives each one the bits that it has alone.
    """
    k, group, depth_count = sliced.codes.shape[1], sliced.group_size, spec.profile.depths
    depths = [np.array([d], np.int32) for d in range(1, depth_count + 1)]
    depths += [rng.integers(1, depth_count + 1, m).astype(np.int32) for m in (2, 5, 33)]
    depths += [np.full(11, depth_count, np.int32)]
    depths += [rng.permutation(np.repeat(np.arange(1, depth_count + 1, dtype=np.int32), FEW_TOKENS + 5))]
    runs: Runs = []
    for depth in depths:
        x = activations(rng, len(depth), k, group)
        y = sliced_matmul(x, depth, sliced, spec.profile, spec.activation_bits)
        tolerance = matmul_tolerance(x, depth, sliced, spec)
        run: dict[str, dict[str, Any]] = {
            "in": {"x": x[None], **dictated(depth[None])},
            "out": {"y": y[None], "depth": depth[None]},
            "tol": {"y": tolerance[None], "depth": 0},
        }
        if len(depth) > 1 and np.bincount(depth).max() <= FEW_TOKENS:
            run["alone"] = {"y": ["x", "routed_by"]}
        runs.append(run)
    return runs


def gather_model(sliced: Sliced, profile: SliceProfile, depth: int) -> onnx.ModelProto:
    n, k = sliced.codes.shape
    attrs = {"N": n, "K": k, "group_size": sliced.group_size, "slices": list(profile.slices), "depth": depth}
    inputs = {"indices": (TensorProto.INT64, ["b", "s"]), "avg_bits": (TensorProto.FLOAT, [2])}
    return op_model("SlicedGather", inputs, stored(sliced, profile), (TensorProto.FLOAT, ["b", "s", k]), **attrs)


def gather_case(
    rng: np.random.Generator, sliced: Sliced, profile: SliceProfile, depth: int
) -> tuple[onnx.ModelProto, Runs]:
    n = len(sliced.codes)
    model = gather_model(sliced, profile, depth)
    runs: Runs = []
    for indices, deepest in ((np.array([n - 1]), 8), (np.array([0, n - 1, 7]), 1), (rng.integers(0, n, 40), 2)):
        y = sliced_gather(indices.astype(np.int64), sliced, profile, min(depth, deepest))
        tolerance = 1e-6 * float(np.abs(y).max())
        given = {"indices": indices.astype(np.int64)[None], "avg_bits": np.array([3, deepest], np.float32)}
        runs.append({"in": given, "out": {"y": y[None]}, "tol": {"y": tolerance}})
    return model, runs


def router_params(rng: np.random.Generator, depths: int, k: int, hidden: int) -> RouterParams:
    more = depths - 1
    extra: dict[str, Any] = {}
    if hidden:
        extra = {
            "w1": (rng.standard_normal((hidden, k)) / np.sqrt(k)).astype(np.float16),
            "b1": rng.standard_normal(hidden).astype(np.float32),
            "w2": rng.standard_normal((more, hidden)).astype(np.float32),
        }
    return RouterParams(
        bias=rng.standard_normal(more).astype(np.float32) * 0.3,
        norm_gain=rng.uniform(0.5, 1.5, more).astype(np.float32),
        budgets=np.array([2, 2.5, 4, 4, 6, 8], np.float32),
        thresholds=np.array([3, 1.5, 0.5, 0.25, -1, -4], np.float32),
        **extra,
    )


def router_constants(router: RouterParams) -> dict[str, Any]:
    constants: dict[str, Any] = {
        "table": np.stack([router.budgets, router.thresholds]),
        "bias": router.bias,
        "norm_gain": router.norm_gain,
    }
    if router.w1 is not None:
        constants |= {"w1": router.w1, "b1": router.b1, "w2": router.w2}
    return constants


def clear_tokens(
    rng: np.random.Generator, router: RouterParams, k: int, allowed: tuple[float, int], tokens: int
) -> tuple[F32, I32]:
    """Up to ``tokens`` rows [M, k] that are not near the threshold, and their depths [M].

    allowed: the budget, and the deepest depth.
    """
    bits, deepest = allowed
    x = rng.standard_normal((4 * tokens, k)) * np.exp(rng.standard_normal((4 * tokens, 1)))
    x32 = x.astype(np.float32)
    distance = np.abs(router_scores(x32, router) - threshold_at(bits, router))
    x32 = x32[(distance > 1e-4).all(axis=1)][:tokens]
    return x32, route(x32, bits, router, deepest)


def routed_model(
    sliced: Sliced,
    profile: SliceProfile,
    router: RouterParams,
    width: int,
    weights: dict[str, Any] | None = None,
    **changes: Any,
) -> onnx.ModelProto:
    """Node RoutedMatMul with outputs y and depth.  width: of what the router looks at."""
    n, k = sliced.codes.shape
    attrs = {"N": n, "K": k, "group_size": sliced.group_size, "slices": list(profile.slices), **changes}
    inputs: Inputs = {
        "x": (TensorProto.FLOAT, ["b", "s", k]),
        "routed_by": (TensorProto.FLOAT, ["b", "t", width]),
        "avg_bits": (TensorProto.FLOAT, [2]),
    }
    routing = router_constants(router)
    rules = {name: routing[name] for name in ("table", "bias", "norm_gain")}
    learned = {name: value for name, value in routing.items() if name not in rules}
    constants = {**rules, **(stored(sliced, profile) if weights is None else weights), **learned}
    model = op_model("RoutedMatMul", inputs, constants, (TensorProto.FLOAT, ["b", "s", n]), **attrs)
    model.graph.node[0].output.append("depth")
    model.graph.output.append(helper.make_tensor_value_info("depth", TensorProto.INT32, ["b", "t"]))
    return model


def routed_runs(rng: np.random.Generator, sliced: Sliced, spec: KernelSpec, router: RouterParams, width: int) -> Runs:
    """Budgets below, at, between and above the table's ends, and a ceiling for some.

    One token and many: all multiplied, the last, or none.
    """
    k, group = sliced.codes.shape[1], sliced.group_size
    runs: Runs = []
    for bits in (1.0, 2.0, 2.2, 2.5, 3.3, 5.1, 7.9, 8.0, 9.0):
        for tokens, rows in ((1, 1), (60, 4)) if bits != 3.3 else ((1, 1), (30, 30), (30, 4), (30, 0)):
            deepest = 2 if bits in (2.0, 5.1, 9.0) else 8
            by, depth = clear_tokens(rng, router, width, (bits, deepest), tokens)
            rows = min(rows, len(by))
            x = activations(rng, rows, k, group)
            last = depth[len(depth) - rows :]
            y = sliced_matmul(x, last, sliced, spec.profile, spec.activation_bits)
            tolerance = matmul_tolerance(x, last, sliced, spec)
            runs.append(
                {
                    "in": {"x": x[None], "routed_by": by[None], "avg_bits": np.array([bits, deepest], np.float32)},
                    "out": {"y": y[None], "depth": depth[None]},
                    "tol": {"y": tolerance[None], "depth": 0},
                }
            )
    return runs


def save_case(folder: Path, name: str, model: onnx.ModelProto, runs: Runs) -> None:
    case = folder / name
    case.mkdir(parents=True)
    onnx.save(model, case / "model.onnx")
    arrays = {
        f"{i}/{part}/{key}": value for i, run in enumerate(runs) for part, d in run.items() for key, value in d.items()
    }
    np.savez(case / "runs.npz", **arrays)


def gated_cases(rng: np.random.Generator) -> Iterator[tuple[str, onnx.ModelProto, Runs]]:
    """Small, usual and extreme inputs."""
    for op, reference in (("GatedSilu", gated_silu), ("GatedGelu", gated_gelu)):
        model = op_model(op, {"x": (TensorProto.FLOAT, ["b", "s", 96])}, {}, (TensorProto.FLOAT, ["b", "s", 48]))
        runs: Runs = []
        for tokens in (1, 40):
            x = (rng.standard_normal((1, tokens, 96)) * 10.0 ** rng.uniform(-3, 2, (1, tokens, 96))).astype(np.float32)
            gate, up = np.split(np.abs(x.astype(np.float64)), 2, axis=-1)
            # exp is good to two units in the last place, 1 + tanh loses what its two parts have in common.
            tolerance = 3e-7 * (gate + 1e-30) * up
            runs.append({"in": {"x": x}, "out": {"y": reference(x)}, "tol": {"y": tolerance}})
        yield op, model, runs


def experts_model(sliced: Sliced, profile: SliceProfile, count: int, *, own: bool, **changes: Any) -> onnx.ModelProto:
    """A node ExpertsMatMul whose depths are ``dictated``.

    own: whether each expert of a token has an input of its own.
    """
    n, k = sliced.codes.shape
    attrs = {
        "N": n,
        "K": k,
        "group_size": sliced.group_size,
        "slices": list(profile.slices),
        "experts": count,
        **changes,
    }
    inputs: Inputs = {
        "x": (TensorProto.FLOAT, ["b", "s", "j", k] if own else ["b", "s", k]),
        "experts": (TensorProto.INT64, ["b", "s", "j"]),
        "routed_by": (TensorProto.FLOAT, ["b", "s", DICTATED_WIDTH]),
        "avg_bits": (TensorProto.FLOAT, [2]),
    }
    constants = {**router_constants(dictating(profile.depths)), **stored(sliced, profile)}
    model = op_model("ExpertsMatMul", inputs, constants, (TensorProto.FLOAT, ["b", "s", "j", n // count]), **attrs)
    model.graph.node[0].output.append("depth")
    model.graph.output.append(helper.make_tensor_value_info("depth", TensorProto.INT32, ["b", "s"]))
    return model


def experts_runs(rng: np.random.Generator, sliced: Sliced, spec: KernelSpec, count: int, *, own: bool) -> Runs:
    """One token and many, with one expert each, two, or all."""
    k, rows = sliced.codes.shape[1], len(sliced.codes) // count
    experts = [sliced.rows(slice(at * rows, (at + 1) * rows)) for at in range(count)]
    runs: Runs = []
    for tokens, used in ((1, 2), (1, count), (23, 1), (60, 2)):
        depth = rng.integers(1, spec.profile.depths + 1, tokens).astype(np.int32)
        chosen = np.stack([rng.permutation(count)[:used] for _ in range(tokens)])
        x = activations(rng, tokens * (used if own else 1), k, sliced.group_size)
        x = x.reshape(tokens, used, k) if own else x
        each = np.broadcast_to(x if own else x[:, None], (tokens, used, k))
        allowed = np.zeros((tokens, used, rows))
        for m, j in np.ndindex(chosen.shape):
            allowed[m, j] = matmul_tolerance(each[m, j][None], depth[m : m + 1], experts[chosen[m, j]], spec)[0]
        runs.append(
            {
                "in": {"x": x[None], "experts": chosen[None], **dictated(depth[None])},
                "out": {"y": experts_matmul(x, chosen, depth, experts, spec)[None], "depth": depth[None]},
                "tol": {"y": allowed[None], "depth": 0},
            }
        )
    return runs


def attention_cases(rng: np.random.Generator) -> Iterator[tuple[str, onnx.ModelProto, Runs]]:
    """Attention over keys and values of 8 bits: a prompt, one token and a few, in a context that they fill."""
    for heads, (count, head_dim) in (
        (Heads(3, 64**-0.5), (9, 64)),
        (Heads(1, 256**-0.5, window=21, cap=5.0), (4, 256)),
        (Heads(2, 48**-0.5), (4, 48)),
    ):
        widths = {"q": count * head_dim, "k": heads.kv_heads * head_dim, "v": heads.kv_heads * head_dim}
        cache: tuple[int, Sequence[Any]] = (TensorProto.UINT8, ["b", heads.kv_heads, "c", head_dim + KV_SCALE_BYTES])
        inputs: dict[str, tuple[int, Sequence[Any]]] = {
            **{name: (TensorProto.FLOAT, ["b", "m", width]) for name, width in widths.items()},
            "past_key": cache, "past_value": cache, "past": (TensorProto.INT64, [1]),
        }  # fmt: skip
        model = op_model(
            "CachedAttention", inputs, {}, (TensorProto.FLOAT, ["b", "m", widths["q"]]), num_heads=count,
            kv_num_heads=heads.kv_heads, scale=heads.scale, window=heads.window, softcap=float(heads.cap),
        )  # fmt: skip
        for name in ("present_key", "present_value"):
            model.graph.node[0].output.append(name)
            model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.UINT8, None))
        runs: Runs = []
        for past, new in ((0, 32), (47, 1), (252, 4), (540, 20)):
            held = np.zeros((2, heads.kv_heads, past + new, head_dim + KV_SCALE_BYTES), np.uint8)
            for stored_rows, keys in zip(held, (True, False), strict=True):
                rows = rng.standard_normal((past, heads.kv_heads, head_dim)).astype(np.float32)
                put_rows(stored_rows, 0, rows, keys=keys)
            q, k, v = (
                rng.standard_normal((new, of, head_dim)).astype(np.float32) for of in (count, *[heads.kv_heads] * 2)
            )
            y, *caches = cached_attention(q, k, v, (held[0], held[1], past), heads)
            flat = {name: x.reshape(1, new, -1) for name, x in zip("qkv", (q, k, v), strict=True)}
            runs.append(
                {
                    "in": {**flat, "past_key": held[0][None], "past_value": held[1][None], "past": np.array([past])},
                    "out": {
                        "y": y.reshape(1, new, -1), "present_key": caches[0][None], "present_value": caches[1][None]
                    },
                    "tol": {"y": ATTENTION * np.abs(v).max(), "present_key": 0, "present_value": 0},
                }
            )  # fmt: skip
        yield f"attention_{head_dim}", model, runs


SHAPES = {
    32: ((40, 576), (16, 96), (200, 1536)),
    64: ((40, 576), (16, 896), (200, 1536)),
    128: ((40, 896), (200, 1536)),
}


def prepare(folder: Path, spec: KernelSpec, seed: int = 0) -> None:
    """Write the cases of every op for ``op_check.main``."""
    profile, group = spec.profile, spec.group_size
    rng = np.random.default_rng(seed)
    for n, k in SHAPES[group]:
        sliced = weight(rng, n, k, group, profile.depths)
        model = matmul_model(sliced, profile, stored(sliced, profile))
        save_case(folder, f"matmul_{n}x{k}", model, matmul_runs(rng, sliced, spec))
    sliced = weight(rng, 50, SHAPES[group][0][1], group, profile.depths)
    for depth in range(1, profile.depths + 1):
        save_case(folder, f"gather_d{depth}", *gather_case(rng, sliced, profile, depth))
    sliced = weight(rng, 5 * 48, SHAPES[group][0][1], group, profile.depths)
    for own in (False, True):
        model = experts_model(sliced, profile, 5, own=own)
        save_case(
            folder, f"experts_{'own' if own else 'one'}_input", model, experts_runs(rng, sliced, spec, 5, own=own)
        )
    for name, model, runs in gated_cases(rng):
        save_case(folder, name, model, runs)
    if spec.kv_bits == 8:
        for name, model, runs in attention_cases(rng):
            save_case(folder, name, model, runs)
    for hidden, k in ((0, 576), (8, 896), (32, 1536)):
        router = router_params(rng, profile.depths, k, hidden)
        runs = routed_runs(rng, sliced, spec, router, k)
        save_case(folder, f"routed_h{hidden}", routed_model(sliced, profile, router, k), runs)
