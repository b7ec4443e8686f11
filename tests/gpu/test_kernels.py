"""Every kernel on OpenCL (PoCL) and WebGPU (lavapipe) against the numpy definition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from devices import Runner, routing, state
from op_cases import router_params

from mbq_export.format.codes import F32, F64, Sliced, decode
from mbq_export.format.ops import sliced_gather, sliced_matmul
from mbq_export.format.planes import pack_scales, pack_slices
from mbq_export.format.router import RouterParams, router_scores
from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_targets.gpu import attention, matmul, sampling
from mbq_targets.gpu import routing as rules
from mbq_targets.gpu.kernel import DEEPEST
from mbq_targets.gpu.work_groups import WorkGroups

pytestmark = pytest.mark.heavy

PROFILES = [SliceProfile((3, 1, 2, 2)), SliceProfile((2, 2, 2, 2))]
WORK_GROUPS = [WorkGroups(4, 8, 8, 64, 32), WorkGroups(1, 4, 2, 32, 16), WorkGroups(2, 8, 4, 64, 64)]
CHUNK = 16
# Float32 sums in another order than the definition's, of the sum of |terms|.
RELATIVE = 2e-6
NO_BOUND = 8


def weight(rng: np.random.Generator, n: int, k: int, group: int, depths: int = 4) -> Sliced:
    codes = rng.integers(0, 256, (n, k), dtype=np.uint8)
    scales, zeros = (rng.integers(0, 256, (n, k // group), dtype=np.uint8) for _ in range(2))
    rows = rng.uniform(0.01, 0.1, (n, depths)).astype(np.float16)
    scales[n // 2, 0] = 0
    rows[0] = 1e-5  # subnormal in float16
    return Sliced(codes, scales, zeros, rows)


def bounded(of: Any, deepest: int) -> Any:
    """The buffer ``state`` with a bound on depths."""
    of[DEEPEST] = deepest
    return of


def stored(sliced: Sliced, profile: SliceProfile) -> dict[str, Any]:
    return {"planes": np.concatenate(pack_slices(sliced.codes, profile)), "scales": pack_scales(sliced)}


def exact_matmul(x: F32, depth: Any, sliced: Sliced, profile: SliceProfile) -> tuple[F64, F64]:
    """float64 x @ w(depth).T without rounding x, and the sum of |terms|."""
    y, size = np.zeros((2, len(x), len(sliced.codes)))
    for row, d in enumerate(depth):
        w = decode(sliced, profile, int(d))
        y[row] = x[row].astype(np.float64) @ w.T
        size[row] = np.abs(x[row]).astype(np.float64) @ np.abs(w).T
    return y, size


@pytest.mark.parametrize(
    ("profile", "work_groups", "n", "k", "group"),
    [
        (PROFILES[0], WORK_GROUPS[0], 40, 576, 64),
        (PROFILES[1], WORK_GROUPS[0], 200, 256, 128),
        (PROFILES[0], WORK_GROUPS[1], 16, 96, 32),
        (PROFILES[1], WORK_GROUPS[2], 25, 192, 64),
    ],
)
def test_matmul_of_one_token(
    runner: Runner, profile: SliceProfile, work_groups: WorkGroups, n: int, k: int, group: int
) -> None:
    rng = np.random.default_rng(n)
    sliced, bias = weight(rng, n, k, group, profile.depths), rng.standard_normal(n).astype(np.float32)
    x = rng.standard_normal((1, k)).astype(np.float32)
    kernel = matmul.matmul("m", matmul.MatrixShape(n, k, group, profile), work_groups, 1, bias=True)
    for depth in range(1, profile.depths + 1):
        arrays = {"x": x, "routing": routing([depth]), **stored(sliced, profile), "bias": bias}
        # What deeper planes hold makes no difference.
        arrays["planes"][-(-n // 16) * 16 * k * profile.depth_bits[depth - 1] // 8 :] ^= 0xA5
        (y,) = runner(kernel, arrays | {"y": np.full((1, n), np.nan, np.float32)}, "y")
        want, size = exact_matmul(x, [depth], sliced, profile)
        assert (np.abs(y - want - bias) <= RELATIVE * (size + np.abs(bias))).all()
        # What the definition's rounding of activations makes of it is no further away than that rounding.
        defined = sliced_matmul(x, np.array([depth], np.int32), sliced, profile)
        assert np.abs(y - defined - bias).max() <= 2.0**-13 * size.max()


@pytest.mark.parametrize(("profile", "work_groups"), list(zip([*PROFILES, PROFILES[0]], WORK_GROUPS, strict=True)))
def test_matmul_of_a_chunk_with_a_depth_for_each_token(
    runner: Runner, profile: SliceProfile, work_groups: WorkGroups
) -> None:
    rng = np.random.default_rng(1)
    n, k, group, count = 72, 320, 64, 13
    sliced = weight(rng, n, k, group, profile.depths)
    x = rng.standard_normal((CHUNK, k)).astype(np.float32)
    depth = rng.integers(1, profile.depths + 1, CHUNK).astype(np.int32)
    now = state(count=count, tokens=np.zeros(CHUNK))
    (order,) = runner(
        rules.order("o", CHUNK), {"routing": routing(depth), "state": now, "order": np.zeros(CHUNK, np.int32)}, "order"
    )
    np.testing.assert_array_equal(order[:count], np.argsort(depth[:count], kind="stable"))
    kernel = matmul.matmul("m", matmul.MatrixShape(n, k, group, profile), work_groups, CHUNK)
    arrays = {"x": x, "routing": routing(depth), "order": order, "state": now, **stored(sliced, profile)}
    (y,) = runner(kernel, arrays | {"y": np.full((CHUNK, n), 7, np.float32)}, "y")
    want, size = exact_matmul(x, depth, sliced, profile)
    assert (np.abs(y - want) <= RELATIVE * size)[:count].all()
    assert (y[count:] == 7).all()  # nothing is written for tokens that are not there


@pytest.mark.parametrize("profile", PROFILES, ids=str)
def test_gather(runner: Runner, profile: SliceProfile) -> None:
    rng = np.random.default_rng(2)
    n, k, group = 50, 192, 64
    sliced, factors = weight(rng, n, k, group, profile.depths), rng.uniform(0.5, 2, k).astype(np.float32)
    tokens = np.array([49, 0, 25, 7], np.int32)
    used = routing([1] * 4) + np.array([0, 5], np.int32)
    arrays = {"factors": factors, "routing": used, **stored(sliced, profile), "x": np.zeros((4, k), np.float32)}
    kernel = matmul.gather("g", matmul.MatrixShape(n, k, group, profile), 32, 4, scaled=True)
    for deepest in range(1, profile.depths + 1):
        now = bounded(state(count=4, tokens=tokens), deepest if deepest < profile.depths else NO_BOUND)
        x, cleared = runner(kernel, arrays | {"state": now}, "x", "routing")
        want = sliced_gather(tokens.astype(np.int64), sliced, profile, deepest) * factors
        np.testing.assert_allclose(x, want, rtol=0, atol=1e-6 * np.abs(want).max())
        assert (cleared[:, 1] == 0).all()


def router(rng: np.random.Generator, profile: SliceProfile, k: int, hidden: int) -> RouterParams:
    """A random router whose thresholds have two budgets."""
    found = router_params(rng, profile.depths, k, hidden)
    return replace(found, budgets=np.array([2, 8], np.float32), thresholds=np.array([3, -4], np.float32))


def router_arrays(params: RouterParams, profile: SliceProfile, share: float = 0.25) -> dict[str, Any]:
    shape = rules.RouterShape(profile, 0 if params.w1 is None else len(params.w1))
    packed = shape.pack(share, 0, params.bias, params.norm_gain, b1=params.b1, w2=params.w2)
    arrays: dict[str, Any] = {"parameters": packed}
    return arrays if params.w1 is None else {**arrays, "w1": rules.pack_w1(params.w1)}


def clear_rows(rng: np.random.Generator, k: int, params: RouterParams, threshold: float, count: int) -> F32:
    """Rows whose scores are not near the threshold: there float32 may decide otherwise than float64."""
    x = (rng.standard_normal((8 * count, k)) * np.exp(rng.standard_normal((8 * count, 1)))).astype(np.float32)
    distance = np.abs(router_scores(x, params) - threshold)
    return x[(distance > 1e-3).all(axis=1)][:count]


def depth_by(params: RouterParams, x: F32, threshold: float) -> Any:
    return 1 + np.cumprod(router_scores(x, params) > threshold, axis=1).sum(axis=1)


@pytest.mark.parametrize("hidden", [0, 16])
@pytest.mark.parametrize("profile", [*PROFILES, SliceProfile((8,))], ids=str)
def test_router(runner: Runner, profile: SliceProfile, hidden: int) -> None:
    rng = np.random.default_rng(3)
    k, threads = 576, 64
    params = router(rng, profile, k, hidden)
    kernel = rules.route("r", k, threads, CHUNK, rules.RouterShape(profile, hidden))
    for threshold, deepest in ((0.4, NO_BOUND), (-3e38, NO_BOUND), (3e38, NO_BOUND), (-3e38, 2), (0.4, 1)):
        x = clear_rows(rng, k, params, threshold, CHUNK)
        now = bounded(state(count=CHUNK, threshold=threshold, tokens=np.zeros(CHUNK)), deepest)
        before = routing(np.zeros(CHUNK))
        before[:, 1] = np.full(CHUNK, 1.5, np.float32).view(np.int32)
        arrays = {"x": x, "routing": before, "state": now, **router_arrays(params, profile)}
        (after,) = runner(kernel, arrays, "routing")
        want = np.minimum(depth_by(params, x, threshold), deepest)
        np.testing.assert_array_equal(after[:, 0], want)
        bits = np.asarray(profile.depth_bits)[want - 1]
        np.testing.assert_allclose(after[:, 1].copy().view(np.float32), 1.5 + 0.25 * bits, rtol=1e-6)


@pytest.mark.parametrize("last", [False, True])
def test_norm_adds_the_branch_and_routes_by_the_sum(runner: Runner, last: bool) -> None:
    rng = np.random.default_rng(4)
    profile, k, tokens, eps = PROFILES[0], 200, 4, 1e-5
    params = router(rng, profile, k, 16)
    x = clear_rows(rng, k, params, 0.4, tokens)
    branch, gain = rng.standard_normal((tokens, k)).astype(np.float32), rng.uniform(0.5, 2, k).astype(np.float32)
    residual = x - branch
    total = residual + branch
    shape = rules.RouterShape(profile, 16)
    kernel = rules.norm("n", k, eps, 32, tokens, branch=True, router=shape, last=last)
    arrays = {
        "residual": residual, "branch": branch, "weight": gain, "y": np.zeros((tokens, k), np.float32),
        "routing": routing(np.zeros(tokens)), "state": state(row=2, count=tokens, threshold=0.4, tokens=[0] * tokens),
        **router_arrays(params, profile),
    }  # fmt: skip
    stream, y, after = runner(kernel, arrays, "residual", "y", "routing")
    wide = total.astype(np.float64)
    want = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + eps) * gain
    depth = depth_by(params, total, 0.4)
    if last:
        np.testing.assert_allclose(y[0], want[2], atol=1e-5)
        np.testing.assert_array_equal(stream, residual)
        assert after[0, 0] == depth[2]
        assert after[:, 1].astype(bool).tolist() == [False, False, True, False]
    else:
        np.testing.assert_allclose(y, want, atol=1e-5)
        np.testing.assert_array_equal(stream, total)
        np.testing.assert_array_equal(after[:, 0], depth)


def test_sum_without_a_norm(runner: Runner) -> None:
    rng = np.random.default_rng(5)
    residual, branch = rng.standard_normal((2, 3, 100)).astype(np.float32)
    kernel = rules.norm("s", 100, 1e-6, 32, 3, branch=True, router=None, normed=False)
    arrays = {"residual": residual, "branch": branch, "y": np.zeros_like(residual)}
    for found in runner(kernel, arrays, "residual", "y"):
        np.testing.assert_array_equal(found, residual + branch)


def test_plain_norm(runner: Runner) -> None:
    rng = np.random.default_rng(5)
    x, gain = rng.standard_normal((3, 100)).astype(np.float32), rng.uniform(0.5, 2, 100).astype(np.float32)
    (y,) = runner(rules.plain_norm("n", 100, 1e-6, 32, 3), {"x": x, "weight": gain}, "x")
    wide = x.astype(np.float64)
    np.testing.assert_allclose(y, wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-6) * gain, atol=1e-5)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate_and_its_router(runner: Runner, activation: str) -> None:
    rng = np.random.default_rng(6)
    profile, k, tokens = PROFILES[0], 320, 5
    params = router(rng, profile, k, 0)
    stacked = (rng.standard_normal((tokens, 2 * k)) * 3).astype(np.float32)
    stacked[0, :4] = (-90, 90, -9, 9)
    gate, up = np.split(stacked.astype(np.float64), 2, axis=1)
    by = {
        "silu": lambda x: x / (1 + np.exp(-x)),
        "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    }
    want = by[activation](gate) * up
    arrays = {
        "stacked": stacked, "y": np.zeros((tokens, k), np.float32), "routing": routing(np.zeros(tokens)),
        "state": state(count=tokens, threshold=1.3, tokens=[0] * tokens), **router_arrays(params, profile),
    }  # fmt: skip
    kernel = rules.gate("g", k, 64, tokens, activation=activation, router=rules.RouterShape(profile, 0))
    y, after = runner(kernel, arrays, "y", "routing")
    np.testing.assert_allclose(y, want, rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(after[:, 0], depth_by(params, want.astype(np.float32), 1.3))


def turned(x: F64, cos: Any, sin: Any) -> F64:
    """x [tokens, heads, width], cos and sin [tokens, half]; numbers behind the first 2 * half stay."""
    half = cos.shape[1]
    a, b = x[..., :half], x[..., half : 2 * half]
    c, s = cos[:, None], sin[:, None]
    return np.concatenate([a * c - b * s, b * c + a * s, x[..., 2 * half :]], axis=-1)


@pytest.mark.parametrize(
    ("rotated", "norm"),
    [
        (32, None), (24, None), (0, None),
        (32, attention.HeadNorm(1e-6)), (24, attention.HeadNorm(1e-6)), (0, attention.HeadNorm(1e-6)),
        (32, attention.HeadNorm(1e-6, rows=True)), (24, attention.HeadNorm(1e-6, last=True)),
    ],
    ids=str,
)  # fmt: skip
def test_rotation_and_cache(runner: Runner, rotated: int, norm: attention.HeadNorm | None) -> None:
    rng = np.random.default_rng(7)
    shape, tokens, count, position, context = attention.Heads(6, 2, 32, rotated), 4, 3, 5, 12
    qkv = rng.standard_normal((tokens, shape.all, 32)).astype(np.float32)
    angle = rng.uniform(0, 7, (context, rotated // 2))
    rotary = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    whole, last = (norm is not None and norm.rows), (norm is not None and norm.last)
    norms = rng.uniform(0.5, 2, (8 if whole else 2, 32)).astype(np.float32)
    growth = rng.uniform(1, 2, context).astype(np.float32)
    keys, values = np.full((2, context, 2, 32), 9, np.float32)
    kernel = attention.rotate("r", shape, tokens, 16, norm=norm, grows=last)
    arrays = {
        "qkv": qkv, "rotary": rotary, "norms": norms, "keys": keys, "values": values, "growth": growth,
        "state": state(position, count, tokens=[0] * tokens), "q": np.zeros((tokens, 6, 32), np.float32),
    }  # fmt: skip
    q, keys, values = runner(kernel, arrays, "q", "keys", "values")
    where = slice(position, position + tokens)
    gains = (norms[:6], norms[6:]) if whole else (norms[0], norms[1])

    def normed(part: F64, i: int) -> F64:
        mean = (part**2).mean((-2, -1) if whole else -1, keepdims=True)
        return part / np.sqrt(mean + 1e-6) * gains[i]

    def made(part: F64, i: int) -> F64:
        part = normed(part, i) if norm is not None and not last else part
        part = turned(part, rotary[where, 0], rotary[where, 1])
        return normed(part, i) if last else part

    want_q, want_k = (made(part, i) for i, part in enumerate(np.split(qkv[:, :8].astype(np.float64), [6], axis=1)))
    if last:
        want_q = want_q * growth[where, None, None]
    np.testing.assert_allclose(q[:count], want_q[:count], atol=1e-5)
    here = slice(position, position + count)
    np.testing.assert_allclose(keys[here], want_k[:count], atol=1e-5)
    np.testing.assert_array_equal(values[here], qkv[:count, 8:])
    for cache in (keys, values):
        assert (np.delete(cache, np.arange(position, position + count), axis=0) == 9).all()


# Threads and channels in every ratio with all that a score can have, then scores with less.
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "threads", "window", "cap"),
    [
        (6, 2, 32, 16, 6, 2.0), (6, 2, 32, 64, 6, 2.0), (3, 3, 64, 16, 6, 2.0), (3, 3, 64, 64, 6, 2.0),
        (6, 2, 32, 16, None, None), (3, 3, 64, 64, 6, None),
    ],
)  # fmt: skip
def test_attention(
    runner: Runner, heads: int, kv_heads: int, width: int, threads: int, window: int | None, cap: float | None
) -> None:
    rng = np.random.default_rng(8)
    shape, tokens, count, context = attention.Heads(heads, kv_heads, width, width), 4, 3, 50
    kernel = attention.attend("a", shape, tokens, threads, scale=width**-0.5, window=window, cap=cap)
    q = rng.standard_normal((tokens, heads, width)).astype(np.float32) * 3
    keys, values = rng.standard_normal((2, context, kv_heads, width)).astype(np.float32)
    for position in (0, 37):
        keys[position + count :], values[position + count :] = np.nan, np.nan  # what no token may see
        arrays = {"q": q, "keys": keys, "values": values, "state": state(position, count, tokens=[0] * tokens)}
        (y,) = runner(kernel, arrays | {"y": np.zeros((tokens, heads, width), np.float32)}, "y")
        for token in range(count):
            last = position + token
            seen = slice(0 if window is None else max(0, last - window + 1), last + 1)
            for head in range(heads):
                kv = head // (heads // kv_heads)
                scores = keys[seen, kv].astype(np.float64) @ q[token, head] * width**-0.5
                scores = scores if cap is None else cap * np.tanh(scores / cap)
                shares = np.exp(scores - scores.max())
                want = shares / shares.sum() @ values[seen, kv]
                np.testing.assert_allclose(y[token, head], want, atol=1e-5)
        keys, values = rng.standard_normal((2, context, kv_heads, width)).astype(np.float32)


def test_turn_of_the_heads_input(runner: Runner) -> None:
    rng = np.random.default_rng(9)
    a, b = 9, 16
    left, right, gain = (rng.standard_normal(shape).astype(np.float32) for shape in ((a, a), (b, b), (a, b)))
    x = rng.standard_normal((a, b)).astype(np.float32)
    y = np.zeros_like(x)
    (one,) = runner(sampling.turn("t", a, b, "left", 32), {"x": x, "factor": left, "y": y}, "y")
    np.testing.assert_allclose(one, left @ x, atol=1e-4)
    arrays = {"x": x, "factor": right, "gain": gain, "y": y}
    (two,) = runner(sampling.turn("t", a, b, "right", 32, gain=True), arrays, "y")
    np.testing.assert_allclose(two, x @ right * gain, atol=1e-4)


def test_soft_cap(runner: Runner) -> None:
    logits = np.linspace(-200, 200, 1001).astype(np.float32)
    (y,) = runner(sampling.cap("c", 1001, 64, 30.0), {"logits": logits}, "logits")
    np.testing.assert_allclose(y, 30 * np.tanh(logits.astype(np.float64) / 30), atol=1e-4)


def test_argmax_takes_the_first_of_equals_and_reports_bits(runner: Runner) -> None:
    rng = np.random.default_rng(10)
    logits = rng.standard_normal(1000).astype(np.float32)
    logits[[333, 900]] = 9
    used = routing(np.zeros(CHUNK))
    used[3, 1] = np.array([4.25], np.float32).view(np.int32)[0]
    arrays = {"logits": logits, "routing": used, "state": state(row=3, tokens=[0] * CHUNK)}
    (result,) = runner(sampling.argmax("a", 1000, 64, CHUNK), arrays | {"result": np.zeros(2, np.int32)}, "result")
    assert result[0] == 333
    assert result[1:].view(np.float32)[0] == 4.25
