"""The decoder's operations, each against its definition, on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from op_cases import matmul_tolerance, weight

from mbq_export.format.attention import round_rows, round_weights, spread, spread_width
from mbq_export.format.delta import delta_net
from mbq_export.format.experts import choose_experts, experts_matmul
from mbq_export.format.ops import gated_gelu, sliced_matmul
from mbq_export.format.per_layer import per_layer
from mbq_export.format.planes import pack_matrix
from mbq_export.format.router import RouterParams, route
from mbq_runtime.bundle.layout import kv_row_bytes
from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_targets.build import build_decoder
from mbq_targets.constants import FEW_TOKENS, WEIGHT_STEPS
from mbq_targets.machines import resolve
from mbq_targets.spec import DeltaNet, Experts, KernelSpec
from mbq_targets.tvm_ops.attention import STILL, Attention
from mbq_targets.tvm_ops.experts import fields as expert_fields
from mbq_targets.tvm_ops.linear import fields
from mbq_targets.tvm_ops.module import Shape, build_module

pytestmark = pytest.mark.heavy

PROFILE, GROUP = SliceProfile.parse("3,1,2,2"), 64
SPECS = {bits: KernelSpec(PROFILE, GROUP, bits) for bits in (16, 8)}
"""By the bits of activations."""
HEADS = Attention(heads=6, kv_heads=2, head_dim=32, rotated=24, scale=0.2, norm_eps=1e-5)
ROWS = replace(HEADS, norm_rows=True, some_still=True)
LAST = replace(HEADS, norm_last=True, cap=1.5, grows=True, gates=1)
CHANNELS = replace(HEADS, gates=HEADS.head_dim)
ROUNDED = replace(LAST, kv_bits=8)
ROUNDED_NORMED = replace(HEADS, kv_bits=8, value_norms=True)
SHARED = replace(HEADS, value_norms=True, some_share=True)
NETS = [DeltaNet(3, 6, 16, 32, taps=4), DeltaNet(2, 2, 48, 16, taps=2)]
EXPERTS = {
    16: Experts(21, 3, 48, (True,), normed=True, sum_eps=1e-6),
    8: Experts(5, 2, 48, (True,), sigmoid=True, biased=True, scale=1.5),
}
"""By the bits of activations."""
BUILDS: dict[str, tuple[int, Attention, DeltaNet | None]] = {
    "plain": (16, HEADS, None),
    "8 bits": (8, CHANNELS, NETS[0]),
    "norms of rows": (16, ROWS, NETS[1]),
    "norms behind the rotation": (16, LAST, None),
    "rounded keys and values": (16, ROUNDED, None),
    "rounded values with norms": (16, ROUNDED_NORMED, None),
    "shared keys and values": (16, SHARED, None),
}
"""What is compiled, for seconds each: bits of activations, attention, delta net.  They do not touch each other."""
NORM_EPS = 1e-5
N, K, HIDDEN = 1000, 320, 8
RELATIVE = 1e-5
ONE_STEP = 1 / WEIGHT_STEPS
"""Where a sum in another order moves a number to the next of its 8 bits."""
Array = NDArray[Any]
Operations = Callable[[str], Any]
"""(name) -> compiled operation"""


def compiled(bits: int, heads: Attention, net: DeltaNet | None, folder: Path) -> Operations:
    import tvm

    target = resolve("host")
    if not target.native:
        pytest.skip("no kernels for this machine")
    spec = replace(SPECS[bits], kv_bits=heads.kv_bits)
    shape = Shape(
        spec,
        NORM_EPS,
        "gelu_tanh",
        (heads,),
        (16, 20),
        adds=heads.norm_rows,
        logits_cap=heads.cap,
        convolution=(3, True) if heads.norm_rows else None,
        delta=net,
        per_layer=heads.some_share,
        scales=heads.some_share,
        experts=EXPERTS[bits] if heads in (HEADS, CHANNELS) else None,
    )
    build_decoder(target, spec, build_module(shape), folder / "ops.so")
    module = tvm.runtime.load_module(str(folder / "ops.so"))
    return lambda name: module[f"mbq_{name}"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Operations]:
    """The operations of a row of ``BUILDS``, by name, compiled once."""
    return cache(lambda build: compiled(*BUILDS[build], tmp_path_factory.mktemp("ops")))


@pytest.fixture
def ops(built: Callable[[str], Operations]) -> Operations:
    return built("plain")


def weights(parts: dict[str, Array]) -> tuple[Array, dict[str, int]]:
    """The parts in one row of bytes, and where each begins."""
    data, places = b"", {}
    for name, part in parts.items():
        data += bytes(-len(data) % 64)
        places[name] = len(data)
        data += np.ascontiguousarray(part).tobytes()
    return np.frombuffer(data, np.uint8).copy(), places


def random_router(rng: np.random.Generator) -> RouterParams:
    steps = PROFILE.depths - 1
    return RouterParams(
        rng.standard_normal(steps).astype(np.float32), rng.standard_normal(steps).astype(np.float32),
        np.array([3, 4, 6, 8], np.float32), np.array([3, 0, -1, -3], np.float32),
        (rng.standard_normal((HIDDEN, K)) / 20).astype(np.float16), rng.standard_normal(HIDDEN).astype(np.float32),
        rng.standard_normal((steps, HIDDEN)).astype(np.float32),
    )  # fmt: skip


def router_parts(router: RouterParams) -> dict[str, Any]:
    return {
        "table": np.stack([router.budgets, router.thresholds]), "router_bias": router.bias,
        "norm_gain": router.norm_gain, "w1": router.w1, "b1": router.b1, "w2": router.w2,
    }  # fmt: skip


ROUTER_NUMBERS = {"entries": 4, "hidden": HIDDEN, "parameters": 3, "all_parameters": 4}


@pytest.mark.parametrize(("build", "activation_bits"), [("plain", 16), ("8 bits", 8)])
@pytest.mark.parametrize(("bits", "deepest"), [(3.0, 4), (4.6, 4)])
@pytest.mark.parametrize("tokens", [1, 7, 60])
@pytest.mark.parametrize("own_rows", [False, True])
def test_experts_linear(
    built: Callable[[str], Operations], own_rows: bool, tokens: int, bits: float, deepest: int, build: str,
    activation_bits: int,
) -> None:  # fmt: skip
    """own_rows: each expert of a token has a row of x."""
    ops, spec, of, n = built(build), SPECS[activation_bits], EXPERTS[activation_bits], 48
    rng = np.random.default_rng(tokens)
    sliced, router = weight(rng, of.count * n, K, GROUP), random_router(rng)
    data, places = weights({**pack_matrix(sliced, PROFILE), **router_parts(router)})
    numbers = {**places, **ROUTER_NUMBERS, "count": of.count}
    chosen = np.argsort(rng.random((tokens, of.count)))[:, : of.used].copy()
    by = rng.standard_normal((tokens, K)).astype(np.float32)
    x = rng.standard_normal((tokens, of.used, K) if own_rows else (tokens, K)).astype(np.float32)
    used, out = np.ones(1, np.float32), np.full((tokens * of.used, n), np.nan, np.float32)
    given, budget = [numbers[field] for field in expert_fields(PROFILE)], np.array([bits, deepest], np.float32)
    ops("experts_linear")(x.reshape(-1, K), chosen, by, budget, data, used, *given, out)
    depth = route(by, bits, router, deepest)
    matrices = [sliced.rows(slice(at * n, (at + 1) * n)) for at in range(of.count)]
    expected = experts_matmul(x, chosen, depth, matrices, spec)
    rows = np.broadcast_to(x if own_rows else x[:, None], (tokens, of.used, K))
    for (m, j), expert in np.ndenumerate(chosen):
        tolerance = matmul_tolerance(rows[m, j][None], depth[m : m + 1], matrices[expert], spec)[0]
        assert (np.abs(out[m * of.used + j] - expected[m, j]) <= tolerance).all()
    assert used[0] == pytest.approx(1 + 0.75 * np.mean([PROFILE.depth_bits[d - 1] for d in depth]))


@pytest.mark.parametrize(("build", "activation_bits"), [("plain", 16), ("8 bits", 8)])
def test_experts_are_chosen_and_added(built: Callable[[str], Operations], build: str, activation_bits: int) -> None:
    ops, of, rng = built(build), EXPERTS[activation_bits], np.random.default_rng(7)
    x, chooser = (
        rng.standard_normal((21, 64)).astype(np.float32),
        rng.standard_normal((of.count, 64)).astype(np.float32),
    )
    bias = rng.standard_normal(of.count).astype(np.float32) if of.biased else None
    parts = {} if bias is None else {"bias": np.pad(bias, (0, -of.count % 16))}
    data, places = weights({"chooser": chooser, **parts})
    chosen, shares = np.full((21, of.used), -1), np.zeros((21, of.used), np.float32)
    ops("choose")(x, data, *places.values(), chosen, shares)
    expected, of_expected = choose_experts(x, chooser, of, bias)
    np.testing.assert_array_equal(chosen, expected)
    np.testing.assert_allclose(shares, of_expected, rtol=RELATIVE)
    rows, out = rng.standard_normal((21, of.used, 48)).astype(np.float32), np.zeros((21, 48), np.float32)
    ops("add_experts")(rows.reshape(-1, 48), shares, out)
    np.testing.assert_allclose(out, (rows * shares[..., None]).sum(1), rtol=RELATIVE, atol=RELATIVE)


@pytest.mark.parametrize(("build", "activation_bits"), [("plain", 16), ("8 bits", 8)])
@pytest.mark.parametrize(("bits", "deepest"), [(3.0, 4), (4.6, 4), (8.0, 4), (4.6, 2), (8.0, 3)])
@pytest.mark.parametrize(("tokens", "wanted"), [(1, 1), (7, 7), (9, 1), (40, 40)])
def test_linear(
    built: Callable[[str], Operations], tokens: int, wanted: int, bits: float, deepest: int, build: str,
    activation_bits: int,
) -> None:  # fmt: skip
    ops, spec = built(build), SPECS[activation_bits]
    rng = np.random.default_rng(tokens)
    sliced, router = weight(rng, N, K, GROUP), random_router(rng)
    bias = np.pad(rng.standard_normal(N).astype(np.float32), (0, -N % 16))
    data, places = weights({**pack_matrix(sliced, PROFILE), "bias": bias, **router_parts(router)})
    numbers = {**places, **ROUTER_NUMBERS}
    x = rng.standard_normal((tokens, K)).astype(np.float32)
    used, out = np.ones(1, np.float32), np.full((wanted, len(bias)), np.nan, np.float32)
    given, budget = [numbers[field] for field in fields(PROFILE)], np.array([bits, deepest], np.float32)
    ops("linear")(x[-wanted:].copy(), x, budget, data, used, *given, out)
    depth = route(x, bits, router, deepest)
    expected = sliced_matmul(x, depth, sliced, PROFILE, spec.activation_bits)[-wanted:] + bias[:N]
    tolerance = matmul_tolerance(x[-wanted:], depth[-wanted:], sliced, spec)
    assert (np.abs(out[:, :N] - expected) <= tolerance + RELATIVE * np.abs(bias).max()).all()
    assert not out[:, N:].any()
    assert used[0] == pytest.approx(1 + 0.75 * np.mean([PROFILE.depth_bits[d - 1] for d in depth]))
    for m in range(wanted) if tokens <= FEW_TOKENS else ():
        one, alone = x[tokens - wanted + m][None].copy(), np.empty_like(out[:1])
        ops("linear")(one, one, budget, data, used, *given, alone)
        np.testing.assert_array_equal(alone[0], out[m])


@pytest.mark.parametrize("window", [5, 1000])
@pytest.mark.parametrize("parts", [(1, 1, 1), (20,), (3, 30, 1, 1), (150,)])
def test_attention_in_parts(ops: Operations, parts: tuple[int, ...], window: int) -> None:
    check_attention(ops, HEADS, parts, window)


@pytest.mark.parametrize("build", ["norms of rows", "norms behind the rotation"])
def test_other_attentions(build: str, built: Callable[[str], Operations]) -> None:
    ops, heads, rng = built(build), BUILDS[build][1], np.random.default_rng(1)
    x, y = rng.standard_normal((2, 3, 64)).astype(np.float32) * 2
    out = np.zeros_like(x)
    if heads.cap is None:
        check_attention(ops, heads, (5, 1, 12), 9, still=True)
        check_convolution(ops)
        ops("add")(x, y, out)
        np.testing.assert_array_equal(out, x + y)
    else:
        ops("cap")(x, out)
        assert np.abs(out - heads.cap * np.tanh(x.astype(np.float64) / heads.cap)).max() < RELATIVE
    check_attention(ops, heads, (5, 1, 12), 9)


def test_gates_of_channels(built: Callable[[str], Operations]) -> None:
    check_attention(built("8 bits"), CHANNELS, (5, 1, 12), 9)


def test_attention_with_8_bits(built: Callable[[str], Operations]) -> None:
    """Few tokens read the codes, and many read tiles."""
    for parts in ((1, 1, 1), (5, 1, 12), (3, 130, 1, 1)):
        check_attention(built("rounded keys and values"), ROUNDED, parts, 1000)
        check_attention(built("rounded keys and values"), ROUNDED, parts, 9)
        check_attention(built("rounded values with norms"), ROUNDED_NORMED, parts, 1000)


def test_values_with_norms_and_blocks_that_share_them(built: Callable[[str], Operations]) -> None:
    """With the other operations that such a model has."""
    ops, rng = built("shared keys and values"), np.random.default_rng(4)
    check_attention(ops, SHARED, (5, 1, 12), 9)
    x, branch = rng.standard_normal((2, 3, 64)).astype(np.float32)
    factor = rng.standard_normal(1).astype(np.float32)
    data, places = weights({"factor": factor})
    out = np.zeros_like(x)
    ops("scale")(x, branch, data, places["factor"], out)
    np.testing.assert_allclose(out, (x + branch) * factor, rtol=1e-6)
    gate, given = rng.standard_normal((2, 3, 48)).astype(np.float32) * 3
    rows, gain = rng.standard_normal((3, 4 * 48)).astype(np.float32), rng.random(48).astype(np.float32) + 0.5
    data, places = weights({"gain": gain})
    out = np.zeros_like(gate)
    ops("per_layer")(gate, given, rows, data, 2 * 48, places["gain"], out)
    expected = per_layer(gate, given, rows[:, 96:144], gain, eps=NORM_EPS, gated=gated_gelu)
    assert np.abs(out - expected).max() <= RELATIVE * np.abs(expected).max()


@pytest.mark.parametrize(("build", "net"), [("8 bits", NETS[0]), ("norms of rows", NETS[1])])
def test_delta_nets(build: str, net: DeltaNet, built: Callable[[str], Operations]) -> None:
    """In passes of several sizes, the second of two states."""
    ops, rng = built(build), np.random.default_rng(3)
    width = sum(net.sizes.values())
    stacked = rng.standard_normal((23, -(-width // 16) * 16)).astype(np.float32) * 2
    stacked[:, width:] = np.nan  # what pads a row is not read
    given = {
        "taps": rng.standard_normal((net.channels, net.taps)), "rate": -np.exp(rng.uniform(-4, 1, net.value_heads)),
        "step": rng.standard_normal(net.value_heads), "gain": rng.random(net.value_dim) + 0.5,
    }  # fmt: skip
    parts = {name: np.asarray(value, np.float32) for name, value in given.items()}
    data, places = weights({**parts, "taps": parts["taps"].T})
    states = np.zeros((2, net.taps - 1, net.channels), np.float32)
    memories = np.zeros((2, net.value_heads, net.key_dim, net.value_dim), np.float32)
    found = []
    for part in np.split(stacked, [9, 10, 11]):
        out = np.full((len(part), net.values), np.nan, np.float32)
        ops("delta")(part.copy(), states, memories, data, 1, *places.values(), out)
        found.append(out)
    expected, after = delta_net(stacked[:, :width], net, parts, eps=NORM_EPS)
    assert np.abs(np.concatenate(found) - expected).max() <= RELATIVE * np.abs(expected).max()
    assert np.abs(memories[1] - after["recurrent"]).max() <= RELATIVE * np.abs(after["recurrent"]).max()
    np.testing.assert_array_equal(states[1].T, after["conv"].astype(np.float32))
    assert not states[0].any()
    assert not memories[0].any()


def check_convolution(ops: Operations) -> None:
    """In passes of several sizes, the second of two states."""
    rng, k = np.random.default_rng(2), 48
    stacked = rng.standard_normal((9, 3 * k)).astype(np.float32)
    taps, bias = rng.standard_normal((3, k)).astype(np.float32), rng.standard_normal(k).astype(np.float32)
    data, places = weights({"taps": taps, "bias": bias})
    states, found = np.zeros((2, 2, k), np.float32), []
    for part in np.split(stacked, [4, 5, 6]):
        out = np.zeros((len(part), k), np.float32)
        ops("convolution")(part.copy(), states, data, 1, *places.values(), out)
        found.append(out)
    b, c, x = np.split(stacked.astype(np.float64), 3, axis=1)
    seen = np.concatenate([np.zeros((2, k)), b * x])
    expected = c * (sum(taps[i] * seen[i : i + 9] for i in range(3)) + bias)
    assert np.abs(np.concatenate(found) - expected).max() <= RELATIVE * np.abs(expected).max()
    assert not states[0].any()


def check_attention(ops: Operations, h: Attention, parts: tuple[int, ...], window: int, *, still: bool = False) -> None:
    """A cache filled by passes of several sizes, in the second of two layers.  still: a layer without rotation."""
    total, layer = sum(parts), 1
    rng = np.random.default_rng(total)
    width, gated = (h.heads + 2 * h.kv_heads) * h.head_dim, h.heads * h.gates
    stride = width - (-gated // 16) * 16  # of a row; gates are padded to a whole block
    given = rng.standard_normal((total, stride)).astype(np.float32)
    qkv, gates = given[:, :width], given[:, width : width + gated].astype(np.float64)
    angles = rng.random((total, h.rotated // 2))
    tables = [np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)]
    sizes = (h.heads, h.kv_heads) if h.norm_rows else (1, 1)
    norms = [rng.random(size * h.head_dim).astype(np.float32) + 0.5 for size in sizes]
    growth = rng.random(total).astype(np.float32) + 1
    arrays = dict(zip(("cos", "sin", "q_norm", "k_norm"), [*tables, *norms], strict=True))
    data, places = weights(arrays | ({"growth": growth} if h.grows else {}))
    if still:
        places |= {"cos": STILL, "sin": STILL}
        tables = [np.ones_like(tables[0]), np.zeros_like(tables[1])]
    numbers = {"layer": layer, "window": window, "shares": 0, **places}
    blocks = -(-total // 16)
    keys = np.zeros((2, h.kv_heads, blocks, h.head_dim, 16), np.float32)
    values = np.zeros((2, h.kv_heads, blocks * 16, h.head_dim), np.float32)
    if h.kv_bits == 8:
        keys, values = np.zeros((2, 2, h.kv_heads, blocks * 16, kv_row_bytes(h.head_dim, 8)), np.uint8)
    found, start = [], 0
    for size in parts:
        out = np.zeros((size, h.heads * h.head_dim), np.float32)
        rows = given[start : start + size].copy()
        ops("attention")(rows, np.array([start]), keys, values, data, *(numbers[field] for field in h.fields), out)
        found.append(out)
        start += size
    expected = reference_attention(h, qkv.astype(np.float64), tables, norms, window, growth)
    if h.gates:
        expected *= np.repeat(1 / (1 + np.exp(-gates)), h.head_dim // h.gates, axis=1)
    relative = ONE_STEP if h.kv_bits == 8 else RELATIVE
    assert np.abs(np.concatenate(found) - expected).max() <= relative * np.abs(expected).max()
    assert not keys[0].any()
    assert not values[0].any()
    if h.some_share:  # queries alone, of the last part again
        before, queries, out = (keys.copy(), values.copy()), rows[:, : h.heads * h.head_dim].copy(), np.zeros_like(out)
        numbers["shares"] = 1
        past = np.array([total - parts[-1]])
        ops("attention")(queries, past, keys, values, data, *(numbers[field] for field in h.fields), out)
        np.testing.assert_array_equal(out, found[-1])
        np.testing.assert_array_equal(keys, before[0])
        np.testing.assert_array_equal(values, before[1])


def reference_attention(
    h: Attention, qkv: Array, tables: list[Array], norms: list[Array], window: int, growth: Array
) -> Array:
    total = len(qkv)
    q, k, v = np.split(qkv.reshape(total, -1, h.head_dim), [h.heads, h.heads + h.kv_heads], axis=1)
    half = h.rotated // 2
    cos, sin = (table[:, None] for table in tables)

    def normed(x: Array, gain: Array) -> Array:
        mean = (x**2).mean((-2, -1) if h.norm_rows else -1, keepdims=True)
        return x / np.sqrt(mean + 1e-5) * (gain.reshape(x.shape[1:]) if h.norm_rows else gain)

    def turned(x: Array, gain: Array) -> Array:
        x = x if h.norm_last else normed(x, gain)
        a, b = x[..., :half], x[..., half : 2 * half]
        x = np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], -1)
        return normed(x, gain) if h.norm_last else x

    q, k = turned(q, norms[0]), turned(k, norms[1])
    v = normed(v, np.ones(h.head_dim)) if h.value_norms else v
    q = q * growth[:, None, None] if h.grows else q
    v_scales = np.ones(v.shape[:2])
    if h.kv_bits == 8:
        q, k = (spread(codes * scales[..., None]) for codes, scales in (round_rows(spread(x)) for x in (q, k)))
        q, k = q / spread_width(h.head_dim), k / spread_width(h.head_dim)
        v, v_scales = round_rows(spread(v))
    k, v, v_scales = (np.repeat(x, h.heads // h.kv_heads, axis=1) for x in (k, v, v_scales))
    scores = np.einsum("mhd,nhd->hmn", q, k) * h.scale
    scores = scores if h.cap is None else h.cap * np.tanh(scores / h.cap)
    ahead = np.arange(total)[None] - np.arange(total)[:, None]
    scores[:, (ahead > 0) | (ahead <= -window)] = -np.inf
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    if h.kv_bits == 8:
        mixed = np.einsum("hmn,nhd->mhd", round_weights(scores * v_scales.T[:, None]), v)
        return (spread(mixed) / spread_width(h.head_dim)).reshape(total, -1)
    return np.einsum("hmn,nhd->mhd", scores, v).reshape(total, -1)


def test_gate_and_head_input(ops: Operations) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 128)).astype(np.float32) * 4
    out = np.zeros((3, 64), np.float32)
    ops("gate")(x, out)
    wide, up = x[:, :64].astype(np.float64), x[:, 64:]
    active = 0.5 * wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))
    assert np.abs(out - active * up).max() <= RELATIVE * np.abs(active * up).max()

    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0].astype(np.float32) for n in (16, 20))
    gain = rng.random(K).astype(np.float32)
    parts = {"left_back": left.T, "left": left, "right": right, "right_back": right.T, "gain": gain}
    data, places = weights(parts)
    x = rng.standard_normal((3, K)).astype(np.float32)
    out = np.zeros_like(x)
    ops("head_input")(x, data, *places.values(), out)
    turn = np.kron(left, right).astype(np.float64)
    expected = x @ turn.T * gain @ turn
    assert np.abs(out - expected).max() <= RELATIVE * np.abs(expected).max()
