"""The plan of a depth: every plane once, weights that add up to the code, operands that fit a byte."""

from __future__ import annotations

import doctest
from itertools import product

import numpy as np
import pytest

from mbq_export.format.codes import levels
from mbq_runtime.bundle.facts import GROUP_SIZES
from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_targets.kernels import layout
from mbq_targets.kernels.layout import DepthPlan, plan_depth, plane_places


def profiles() -> list[SliceProfile]:
    """All 128 ways to cut 8 bits into slices."""
    cuts = product((False, True), repeat=7)
    found = []
    for cut in cuts:
        widths = [1]
        for starts_new in cut:
            if starts_new:
                widths.append(1)
            else:
                widths[-1] += 1
        found.append(SliceProfile(tuple(widths)))
    return found


def bit_weights(plan: DepthPlan) -> dict[tuple[int, int], float]:
    """Weight, in levels, that the plan gives bit ``b`` of plane ``p``: {(p, b): weight}."""
    weights: dict[tuple[int, int], float] = {}
    for segment in plan.segments:
        for place, field in enumerate(segment.fields):
            unit = segment.factor * 2.0**segment.unit_log2 * 4 ** (segment.width - 1 - place)
            if field.two_bit:
                weights |= {(field.planes[0], 1): 2 * unit, (field.planes[0], 0): unit}
            elif len(field.planes) == 2:
                weights |= {(field.planes[0], 0): 2 * unit, (field.planes[1], 0): unit}
            else:
                weights[field.planes[0], 0] = 2 * unit if field.high else unit
    return weights


@pytest.mark.parametrize("max_width", [2, 4])
def test_every_profile_is_read_exactly(max_width: int) -> None:
    checked = 0
    for profile in profiles():
        for depth, (planes, bits) in enumerate(zip(profile.depth_planes, profile.depth_bits, strict=True), 1):
            plan = plan_depth(profile, depth, max_width)
            low = bits
            want: dict[tuple[int, int], float] = {}
            for plane, width in enumerate(profile.plane_bits[:planes]):
                low -= width
                for b in range(width):
                    code = np.array([1 << (low + b + 8 - bits)], np.uint8)
                    want[plane, b] = float(levels(code, profile, bits)[0])
            assert bit_weights(plan) == want, (profile, bits)
            assert plan.max_level == levels(np.array([255], np.uint8), profile, bits)[0]
            assert plan.unit_log2 <= 0
            assert plan.max_level << -plan.tile_unit_log2 <= 255
            # Products of two-byte activations stay within 32 bits.
            assert (plan.max_level << -plan.unit_log2) * max(GROUP_SIZES) * (127 * 256 + 127) < 2**31
            assert all(segment.width in (1, 2, 4) and segment.width <= max_width for segment in plan.segments)
            checked += 1
    assert checked == sum(profile.depths for profile in profiles()) == 576


def test_nibbles_of_each_part() -> None:
    """The two profiles in use need a dot product for the coarse nibble of four weights, and one for the fine nibble."""
    for slices in ((2, 2, 2, 2), (3, 1, 2, 2)):
        profile = SliceProfile(slices)
        plans = [plan_depth(profile, depth) for depth in range(1, 5)]
        assert [[segment.factor for segment in plan.segments] for plan in plans] == [
            [1], [1], [profile.stride(6), 1], [profile.stride(8), 1],
        ]  # fmt: skip


def test_a_single_slice_is_joined_to_whole_bytes() -> None:
    assert [segment.width for segment in plan_depth(SliceProfile((8,)), 1).segments] == [4]


def test_places_of_planes() -> None:
    profile = SliceProfile((3, 1, 2, 2))
    assert plane_places(profile, 5) == [(0, 0), (0, 2), (1, 0), (2, 0), (3, 0)]
    assert plane_places(profile, 3) == [(0, 0), (0, 2), (1, 0)]


def test_the_documented_example_is_true() -> None:
    assert doctest.testmod(layout) == (0, 2)
