"""The plan of a depth: every plane once, weights that add up to the code, operands that fit a byte."""

from __future__ import annotations

import doctest
from itertools import product

import pytest

from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_targets.kernels import layout
from mbq_targets.kernels.layout import DepthPlan, plan_depth, plane_offsets


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
    """Weight, in codes, that the plan gives bit ``b`` of plane ``p``: {(p, b): weight}."""
    weights: dict[tuple[int, int], float] = {}
    for segment in plan.segments:
        for place, field in enumerate(segment.fields):
            unit = 2.0**segment.unit_log2 * 4 ** (segment.width - 1 - place)
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
        for planes, bits in zip(profile.depth_planes, profile.depth_bits, strict=True):
            plan = plan_depth(profile.plane_bits, planes, max_width)
            low = bits
            want: dict[tuple[int, int], float] = {}
            for plane, width in enumerate(profile.plane_bits[:planes]):
                low -= width
                want |= {(plane, b): 2.0 ** (low + b) for b in range(width)}
            assert bit_weights(plan) == want, (profile, bits)
            assert plan.unit_log2 <= 0
            assert ((1 << bits) - 1) << -plan.tile_unit_log2 <= 255
            assert all(segment.width in (1, 2, 4) and segment.width <= max_width for segment in plan.segments)
            checked += 1
    assert checked == sum(profile.depths for profile in profiles()) == 576


def test_whole_bytes_where_planes_are_neighbours() -> None:
    """The two profiles in use need one dot product per four weights at full depth."""
    for slices in ((2, 2, 2, 2), (3, 1, 2, 2)):
        profile = SliceProfile(slices)
        plans = [plan_depth(profile.plane_bits, planes) for planes in profile.depth_planes]
        assert all(len(plan.segments) == 1 for plan in plans)
        assert plans[-1].segments[0].width == 4


def test_plane_offsets() -> None:
    assert plane_offsets((2, 1, 1, 2, 2)) == (0, 2, 3, 4, 6)


def test_the_documented_example_is_true() -> None:
    assert doctest.testmod(layout) == (0, 2)
