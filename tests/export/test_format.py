"""The number format: packing is a bijection, and the values are the paper's recursive quantiser."""

from __future__ import annotations

import numpy as np
import pytest

from mbq_export.format.codes import Sliced, decode, decode_f32, with_scales
from mbq_export.format.ops import quantize_activations, sliced_gather, sliced_matmul
from mbq_export.format.planes import pack_scales, pack_slices, scales_shape, slice_bytes, unpack_scales, unpack_slices
from mbq_export.format.router import RouterParams, route, threshold_at
from mbq_export.slicing import rtn
from mbq_runtime.bundle.slice_profile import SliceProfile

PROFILES = ["2,2,2,2", "3,1,2,2", "1,1,2,4", "8"]


def _random(n: int, k: int, groups: int, depths: int = 4, seed: int = 0) -> Sliced:
    rng = np.random.default_rng(seed)
    codes, scales, zeros = (rng.integers(0, 256, (n, of), dtype=np.uint8) for of in (k, groups, groups))
    return Sliced(codes, scales, zeros, rng.uniform(0.01, 1, (n, depths)).astype(np.float16))


@pytest.mark.parametrize("slices", PROFILES)
@pytest.mark.parametrize(("n", "k"), [(16, 64), (37, 256), (1, 32), (48, 576)])
def test_slices_unpack_to_the_same_codes(slices: str, n: int, k: int) -> None:
    profile = SliceProfile.parse(slices)
    codes = np.random.default_rng(0).integers(0, 256, (n, k), dtype=np.uint8)
    packed = pack_slices(codes, profile)
    for stored, width in zip(packed, profile.slices, strict=True):
        assert stored.shape == (slice_bytes(n, k, width),) == (-(-n // 16) * 16 * k * width // 8,)
    np.testing.assert_array_equal(unpack_slices(packed, n, k, profile), codes)


def test_bytes_of_planes_lie_where_the_format_says() -> None:
    """One weight set in row 3, k = 4 * 2 + 1 of the second block, in each plane of [3,1,2,2]."""
    profile = SliceProfile.parse("3,1,2,2")
    codes = np.zeros((16, 64), np.uint8)
    codes[3, 16 + 9] = 0b10_1_0_11_01
    first, second, third, fourth = pack_slices(codes, profile)
    two_bit = 64 * 16 * 2 // 8
    # 2-bit planes: block 1 of 16 k, byte 4 * row + 1, field 2; 1-bit planes: block 0 of 32 k, k = 25 = 4 * 6 + 1.
    assert first[64 + 13] == 0b10 << 4
    assert first[two_bit + 13] == 1 << 6
    assert second[13] == 0
    assert third[64 + 13] == 0b11 << 4
    assert fourth[64 + 13] == 0b01 << 4
    assert sum(np.count_nonzero(stored) for stored in (first, second, third, fourth)) == 4


def test_scales_unpack_to_the_same() -> None:
    sliced = _random(37, 320, 5)
    packed = pack_scales(sliced)
    assert packed.shape == scales_shape(37, 5, 4) == (3, 9, 32)
    for depth in (1, 4):
        assert packed[2, depth - 1, 8:10].view("<f2")[0] == sliced.row_scale[36, depth - 1]
    assert packed[2, 8, 4] == sliced.scale_codes[36, 4]
    assert packed[2, 8, 16 + 4] == sliced.zero_codes[36, 4]
    scales, zeros, rows = unpack_scales(packed, 37, 4)
    np.testing.assert_array_equal(scales, sliced.scale_codes)
    np.testing.assert_array_equal(zeros, sliced.zero_codes)
    np.testing.assert_array_equal(rows, sliced.row_scale)


@pytest.mark.parametrize("slices", ["2,2,2,2", "3,1,2,2"])
def test_coarse_depths_are_the_recursive_residual_quantiser(slices: str) -> None:
    profile = SliceProfile.parse(slices)
    weight = np.random.default_rng(2).normal(size=(8, 128)).astype(np.float32)
    sliced = rtn.slice_weight(weight, 64, profile, "w")
    scale, offset = (np.repeat(v.astype(np.float64), 64, axis=1) for v in (sliced.scale, sliced.offset))
    residual, value, bits = weight - offset, offset.copy(), 0
    for depth, width in enumerate(profile.slices[:2], 1):
        bits += width
        step = scale * 2.0 ** (2 - bits)
        # After the base, a residual lies within half of the last step on both sides of zero.
        zero = 0 if depth == 1 else 2 ** (width - 1)
        field = np.clip(np.floor(residual / step + zero), 0, 2**width - 1)
        part = step * (field - zero + 0.5)
        residual, value = residual - part, value + part
        np.testing.assert_allclose(decode(sliced, profile, depth), value, atol=1e-6)


def test_fine_levels_reach_into_both_neighbours() -> None:
    """The sixteen levels of a coarse cell span 4/3 of its width, about its middle."""
    profile = SliceProfile.parse("3,1,2,2")
    codes = np.arange(256, dtype=np.uint8)[None].repeat(1, axis=0)
    sliced = Sliced(codes, np.array([[128]], np.uint8), np.array([[0]], np.uint8), np.full((1, 4), 2, np.float16))
    coarse, fine = decode(sliced, profile, 2)[0].reshape(16, 16), decode(sliced, profile, 4)[0].reshape(16, 16)
    np.testing.assert_allclose(coarse, (np.arange(16)[:, None] + 0.5) / 4 * np.ones(16))
    np.testing.assert_allclose(fine - coarse, np.ones((16, 1)) * (np.arange(16) - 7.5) / 48, atol=1e-12)
    sixths = decode(sliced, profile, 3)[0].reshape(16, 4, 4)
    np.testing.assert_allclose(sixths[:, :, 0], fine.reshape(16, 4, 4).mean(2), atol=1e-12)


@pytest.mark.parametrize("slices", PROFILES)
def test_error_of_a_depth_is_at_most_half_a_step(slices: str) -> None:
    profile = SliceProfile.parse(slices)
    weight = np.random.default_rng(3).normal(size=(16, 256)).astype(np.float32)
    sliced = rtn.slice_weight(weight, 64, profile, "w")
    for depth, bits in enumerate(profile.depth_bits, 1):
        half = np.repeat(sliced.scale.astype(np.float64), 64, axis=1) * profile.step(bits) / 2
        assert (np.abs(decode(sliced, profile, depth) - weight) <= half * (1 + 1e-6)).all()
        np.testing.assert_allclose(decode_f32(sliced, profile, depth), decode(sliced, profile, depth), atol=1e-6)


def test_a_group_of_one_sign_keeps_its_range_and_a_row_of_zeros_stays_zero() -> None:
    profile = SliceProfile.parse("2,2,2,2")
    weight = np.zeros((2, 64), np.float32)
    weight[0, 32:] = 0.25
    sliced = rtn.slice_weight(weight, 32, profile, "w")
    found = decode(sliced, profile, 4)
    assert (np.abs(found[0, 32:] - 0.25) <= sliced.scale[0, 1] * profile.step(8) / 2 * (1 + 1e-6)).all()
    np.testing.assert_array_equal(found[1], 0)


def test_rounded_scales_are_the_nearest() -> None:
    sliced = _random(4, 128, 2)
    wanted = sliced.scale * np.array([1.0, 1.001], np.float32), sliced.offset
    found = with_scales(sliced, *wanted)
    np.testing.assert_array_equal(found.codes, sliced.codes)
    np.testing.assert_allclose(found.scale, wanted[0], atol=float(sliced.row_scale.max()) / 512)
    assert (np.abs(found.offset - wanted[1]) <= found.scale / 128 + 1e-6).all()


def test_activations_round_to_two_bytes() -> None:
    x = np.array([[0.0, 1.0, -2.0, 0.5, 1.001] + [0.0] * 27 + [0.0] * 32], np.float32)
    q, step = quantize_activations(x, 32)
    # 63.5 is 64 high and -128 low, clipped to -127.  31.75 is 32 high and -64 low.
    assert list(q[0, :5]) == [0, 64 * 256 - 127, -32512, 32 * 256 - 64, 16272]
    np.testing.assert_allclose(step, [[2 / 32512, 0]])
    assert (q[0, 32:] == 0).all()


def test_activations_round_to_one_byte() -> None:
    x = np.array([[0.0, 1.0, -2.0, 0.5, 1.001] + [0.0] * 27], np.float32)
    q, step = quantize_activations(x, 32, bits=8)
    assert list(q[0, :5]) == [0, 64, -127, 32, 64]  # 63.5 to even, 31.75, 63.6
    np.testing.assert_allclose(step, [[2 / 127]])


def test_matmul_and_gather_follow_decode() -> None:
    profile = SliceProfile.parse("2,2,2,2")
    rng = np.random.default_rng(4)
    sliced = rtn.slice_weight(rng.normal(size=(40, 128)).astype(np.float32), 64, profile, "w")
    x = rng.integers(-127, 128, (4, 128)).astype(np.float32)
    x[:, ::64] = 127  # every step is 1, so the activations equal their integers
    depth = np.array([1, 4, 2, 4], np.int32)
    y = sliced_matmul(x, depth, sliced, profile)
    for row, d in enumerate(depth):
        np.testing.assert_allclose(y[row], decode(sliced, profile, int(d)) @ x[row], rtol=1e-6, atol=1e-6)
    rows = np.array([39, 0, 39], np.int64)
    np.testing.assert_array_equal(sliced_gather(rows, sliced, profile, 3), decode(sliced, profile, 3)[rows])


def test_router_takes_prefixes_only_and_obeys_the_ends() -> None:
    router = RouterParams(
        bias=np.array([0.0, -5.0, 3.0], np.float32),
        norm_gain=np.ones(3, np.float32),
        budgets=np.array([2, 4, 8], np.float32),
        thresholds=np.array([2, 0, -4], np.float32),
    )
    x = np.exp(np.array([[-1.0], [0.5], [3.0]], np.float32)) * np.ones((3, 32), np.float32)
    # Scores: 2 * log scale + bias.  The third slice's high score does not count where the second fails.
    np.testing.assert_array_equal(route(x, 4.0, router), [1, 2, 4])
    assert threshold_at(6.0, router) == pytest.approx(-2.0)
    np.testing.assert_array_equal(route(x, 2.0, router), [1, 1, 1])
    np.testing.assert_array_equal(route(x, 8.0, router), [4, 4, 4])
