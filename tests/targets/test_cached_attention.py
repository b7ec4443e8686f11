"""Attention over a cache of 8 bits against its definition, for every instruction set this machine has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import op_check
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from op_libraries import Build, runnable

from mbq_export.format import attention
from mbq_runtime.bundle.layout import KEY_LANES, KV_SCALE_BYTES
from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_targets.constants import WEIGHT_STEPS
from mbq_targets.spec import KernelSpec

pytestmark = pytest.mark.heavy

SPEC = KernelSpec(SliceProfile((8,)), 128, kv_bits=8)
RELATIVE = 1e-4
"""Of the largest value."""

ONE_WEIGHT, FEW = 1 / WEIGHT_STEPS, 0.05
"""A weight at the border between two steps may get either. That moves what a few rows attend to."""

CONTEXT = 3000


@dataclass(frozen=True)
class Shape:
    """A node's attributes. rotated: channels of a head; separate: queries, keys and values in three tensors."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int = 0
    cap: float = 0
    rotated: int = 0
    separate: bool = False


SHAPES = {
    "smollm": Shape(9, 3, 64, rotated=64),
    "one each": Shape(2, 2, 32, separate=True),
    "pairs, partly rotated": Shape(4, 2, 48, rotated=24, separate=True),
    "seven": Shape(7, 1, 64, rotated=64),
    "capped windows": Shape(4, 1, 256, window=21, cap=5.0, rotated=256),
}


def tables(shape: Shape) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    angles = np.arange(CONTEXT)[:, None] / 100.0 ** (np.arange(shape.rotated // 2) * 2 / max(shape.rotated, 1))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def tokens(stored: NDArray[np.uint8], *, keys: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    """The scales of a cache [kv_heads, room] and its stored bytes [kv_heads, room, head_dim]."""
    scales, codes = attention.parts(stored, keys=keys)
    room = stored.shape[:2]
    return scales.reshape(room), codes.reshape(*room, -1)


def model(s: Shape) -> onnx.ModelProto:
    row = s.head_dim + KV_SCALE_BYTES
    widths = (s.heads * s.head_dim, *[s.kv_heads * s.head_dim] * 2)
    given = {"q": widths[0], "k": widths[1], "v": widths[2]} if s.separate else {"q": sum(widths)}
    cache = ["b", s.kv_heads, "c", row]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "m", width]) for name, width in given.items()
    ]
    values += [helper.make_tensor_value_info(name, TensorProto.UINT8, cache) for name in ("past_key", "past_value")]
    values.append(helper.make_tensor_value_info("past", TensorProto.INT64, [1]))
    constants = [numpy_helper.from_array(t, n) for t, n in zip(tables(s), ("cos", "sin"), strict=True)]
    inputs = [*("qkv" if s.separate else ("q", "", "")), "past_key", "past_value", "past"]
    node = helper.make_node(
        "CachedAttention", [*inputs, *(("cos", "sin") if s.rotated else ())], ["y", "present_key", "present_value"],
        name="attention", domain="ai.mbq", num_heads=s.heads, kv_num_heads=s.kv_heads, window=s.window,
        scale=s.head_dim**-0.5, softcap=float(s.cap),
    )  # fmt: skip
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    grown = ["b", s.kv_heads, "n", row]
    outputs += [helper.make_tensor_value_info(n, TensorProto.UINT8, grown) for n in ("present_key", "present_value")]
    graph = helper.make_graph([node], "case", values, outputs, constants if s.rotated else [])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.mbq", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def assert_close(found: NDArray[Any], expected: NDArray[Any], size: float) -> None:
    """size: of the values."""
    off = np.abs(found - expected) / size
    assert off.max() <= ONE_WEIGHT
    assert np.mean(off > RELATIVE) <= FEW


class Op:
    """The operator on one library, beside its definition."""

    def __init__(self, shape: Shape, library: Path, folder: Path, threads: int = 2) -> None:
        onnx.save(model(shape), folder / "m.onnx")
        self.session, self.shape = op_check.open_session(folder / "m.onnx", library, threads), shape
        self.past = 0
        self.caches = [np.zeros((shape.kv_heads, 0, shape.head_dim + KV_SCALE_BYTES), np.uint8)] * 2

    def run(self, q: Any, k: Any, v: Any) -> list[Any]:
        """y and the caches, of queries, keys and values [tokens, heads, head_dim]."""
        rows = [x.reshape(1, len(x), -1) for x in (q, k, v)]
        feeds = dict(zip("qkv", rows, strict=True)) if self.shape.separate else {"q": np.concatenate(rows, axis=2)}
        caches = {"past_key": self.caches[0][None], "past_value": self.caches[1][None]}
        return self.session.run(None, {**feeds, **caches, "past": np.array([self.past], np.int64)})

    def check(self, count: int, rng: np.random.Generator, size: float = 1) -> None:
        """A pass of random tokens: attended values, and caches bit for bit.  size: of the values."""
        s = self.shape
        q, k, v = (rng.standard_normal((count, n, s.head_dim)).astype(np.float32) for n in (s.heads, *[s.kv_heads] * 2))
        v *= np.float32(size)
        y, *caches = self.run(q, k, v)
        cos, sin = (table[self.past : self.past + count] for table in tables(s))
        turned = [attention.rotate(x, cos, sin) for x in (q, k)]
        heads = attention.Heads(s.kv_heads, s.head_dim**-0.5, s.window, s.cap)
        expected, *stored = attention.cached_attention(*turned, v, (*self.caches, self.past), heads)
        assert_close(y[0].reshape(expected.shape), expected, np.abs(v).max())
        self.caches, self.past = stored, self.past + count
        for found, wanted, keys in zip(caches, stored, (True, False), strict=True):
            assert found[0].shape == wanted.shape
            for part, expected in zip(*(tokens(one, keys=keys) for one in (found[0], wanted)), strict=True):
                held = slice(None), slice(self.past)  # what follows is anything
                np.testing.assert_array_equal(part[held], expected[held])


@pytest.fixture(params=[target.name for target in runnable()])
def built(request: pytest.FixtureRequest, library: Build) -> Path:
    return library(request.param, SPEC)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_passes_of_every_size(shape: Shape, built: Path, tmp_path: Path) -> None:
    """The cache grows from nothing; passes begin and end within blocks of it."""
    rng, op = np.random.default_rng(1), Op(shape, built, tmp_path)
    for count in (1, 2, 20, 1, 9, 140, 1, 3):
        op.check(count, rng)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("name", ["smollm", "capped windows"])
def test_long_contexts_are_divided(name: str, threads: int, built: Path, tmp_path: Path) -> None:
    """With room to spare, of which what was never written is not a number."""
    rng, op = np.random.default_rng(2), Op(SHAPES[name], built, tmp_path, threads)
    past = 2500
    for i, keys in enumerate((True, False)):
        cache = np.full((op.shape.kv_heads, CONTEXT // KEY_LANES * KEY_LANES, op.caches[0].shape[2]), 255, np.uint8)
        rows = rng.standard_normal((past, op.shape.kv_heads, op.shape.head_dim)).astype(np.float32)
        attention.put_rows(cache, 0, rows, keys=keys)
        op.caches[i] = cache
    op.past = past
    for more in (1, 4, 70):
        op.check(more, rng)


@pytest.mark.parametrize("name", ["smollm", "capped windows"])
def test_a_token_has_the_same_bits_in_any_pass_with_any_threads(name: str, built: Path, tmp_path: Path) -> None:
    """So guessed tokens do not change a reply.  The context has several chunks."""
    shape, past, more = SHAPES[name], 1400, 24
    rng = np.random.default_rng(6)
    heads = (shape.heads, *[shape.kv_heads] * 2)
    q, k, v = (rng.standard_normal((past + more, n, shape.head_dim)).astype(np.float32) for n in heads)
    found = []
    for threads, size in ((1, 1), (1, 8), (2, 1), (2, 3), (4, 8), (4, 24)):
        op, rows = Op(shape, built, tmp_path, threads), []
        for start, stop in [(0, past), *((at, at + size) for at in range(past, past + more, size))]:
            y, keys, values = op.run(q[start:stop], k[start:stop], v[start:stop])
            op.caches, op.past = [keys[0], values[0]], stop
            rows.append(y[0])
        found.append(np.concatenate(rows[1:]))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_an_outlier_does_not_spoil_other_tokens(built: Path, tmp_path: Path) -> None:
    """A row has its own scale.  A row of zeros, or of numbers too small, is zeros."""
    op = Op(SHAPES["one each"], built, tmp_path)
    rng = np.random.default_rng(3)
    q, k, v = rng.standard_normal((3, 4, 2, 32)).astype(np.float32)
    k[0], v[0], k[1], v[1], v[2] = k[0] * 1e6, v[0] * 1e6, 0, 0, v[2] * 1e-32
    _, keys, values = op.run(q, k, v)
    for stored, x, of_keys in ((keys[0], k, True), (values[0], v, False)):
        back, spread = attention.cached_rows(stored, 4, keys=of_keys), attention.spread(x)
        peaks = np.abs(spread).max(axis=2, keepdims=True)
        assert (np.abs(back - spread) <= peaks / 127 * 0.5001 + 1e-30).all()


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_values_of_any_size(size: float, built: Path, tmp_path: Path) -> None:
    """The exponent of a value's scale is added to its score."""
    rng, op = np.random.default_rng(4), Op(SHAPES["pairs, partly rotated"], built, tmp_path)
    for count in (70, 1):
        op.check(count, rng, size)


def test_values_that_count_as_zero(built: Path, tmp_path: Path) -> None:
    """Behind a token with a large value: their weights count in full."""
    op = Op(SHAPES["one each"], built, tmp_path)
    q, k, v = np.random.default_rng(5).standard_normal((3, 20, 2, 32)).astype(np.float32)
    v[1:] *= np.float32(1e-19)
    y = op.run(q, k, v)[0].reshape(20, 2, 32)
    heads = attention.Heads(2, 32**-0.5)
    wanted, *_ = attention.cached_attention(q, k, v, (op.caches[0], op.caches[1], 0), heads)
    assert_close(y, wanted, 1)


BAD = {
    "room for different numbers": lambda feeds: feeds | {"past_value": feeds["past_value"][:, :, :0]},
    "a multiple of 16": lambda feeds: feeds | {n: feeds[n][:, :, :8] for n in ("past_key", "past_value")},
    "past_tokens is 40": lambda feeds: feeds | {"past": np.array([40], np.int64)},
    "past_tokens is -1": lambda feeds: feeds | {"past": np.array([-1], np.int64)},
    "a batch of 2": lambda feeds: feeds | {"q": np.repeat(feeds["q"], 2, axis=0)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_inputs_are_refused(message: str, library: Build, tmp_path: Path) -> None:
    shape = Shape(2, 1, 16)
    op = Op(shape, library(runnable()[0].name, SPEC), tmp_path)
    cache = np.zeros((1, 1, 16, 20), np.uint8)
    feeds = {
        "q": np.zeros((1, 3, 64), np.float32),
        "past_key": cache,
        "past_value": cache,
        "past": np.zeros(1, np.int64),
    }
    op.session.run(None, feeds)
    with pytest.raises(Exception, match=message):
        op.session.run(None, BAD[message](feeds))
