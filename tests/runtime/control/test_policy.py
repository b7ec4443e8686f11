from __future__ import annotations

from dataclasses import replace
from datetime import datetime

import pytest
from controlled import MANIFEST

from mbq_runtime.control.policy import POLICIES, Band, Policy, find_policy, seconds_until
from mbq_runtime.control.triggers import TRIGGERS
from mbq_runtime.errors import UsageError

NOON = datetime(2026, 3, 1, 12, 0, 0)


def test_the_table() -> None:
    assert set(POLICIES) >= {"fixed", "auto", "quality", "battery", "cool"}
    assert not POLICIES["fixed"].bands
    assert set().union(*(policy.bands for policy in POLICIES.values())) == set(TRIGGERS)
    for policy in POLICIES.values():
        assert set(policy.bands) <= set(TRIGGERS)
        assert all(band.start < band.full for band in policy.bands.values())


def test_an_unknown_name_lists_the_table() -> None:
    assert find_policy("cool") is POLICIES["cool"]
    with pytest.raises(UsageError, match=r"policy 'eco': needed one of fixed, .*auto, quality, battery, cool"):
        find_policy("eco")


def test_a_band_goes_from_0_to_1() -> None:
    band = Band(-5.0, 0.0)
    assert [band.pressure(value) for value in (-9.0, -5.0, -2.5, 0.0, 9.0)] == [0.0, 0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("floor", "ceiling", "bounds"),
    [(None, None, (3.0, 8.0)), (4.0, None, (4.0, 8.0)), (None, 5.5, (3.0, 5.5)), (4.0, 4.0, (4.0, 4.0))],
)
def test_bounds_come_from_the_user_and_else_from_the_bundle(
    floor: float | None, ceiling: float | None, bounds: tuple[float, float]
) -> None:
    policy = replace(POLICIES["auto"], floor_bits=floor, ceiling_bits=ceiling).within(MANIFEST)
    assert policy.bounds == bounds
    assert policy.bytes_at == ((3.0, 3000), (8.0, 8000))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"floor_bits": 2.0}, r"average bits 2\.0: tiny, policy auto: takes a number from 3 to 8"),
        ({"ceiling_bits": 9.0}, r"average bits 9\.0: .* from 3 to 8"),
        ({"floor_bits": 6.0, "ceiling_bits": 5.0}, "floor of 6 bits above the ceiling of 5 bits"),
    ],
)
def test_bounds_the_bundle_cannot_hold_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(POLICIES["auto"], **changes).within(MANIFEST)  # type: ignore[arg-type]


@pytest.mark.parametrize("goal", [0.0, -1.0, float("nan"), float("inf")])
def test_a_goal_must_be_a_speed(goal: float) -> None:
    with pytest.raises(UsageError, match="min_tps"):
        Policy("auto", "", min_tps=goal)


def test_a_policy_without_bounds_says_so() -> None:
    with pytest.raises(UsageError, match="policy auto has no bounds"):
        _ = POLICIES["auto"].bounds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("18:00", 6 * 3600), ("11:59", 24 * 3600 - 60), ("12:00", 24 * 3600), ("9:05", 21 * 3600 + 300),
     ("2.5h", 9000), ("40min", 2400), (" 3 h ", 10800)],
)  # fmt: skip
def test_times(text: str, seconds: float) -> None:
    assert seconds_until(text, NOON) == seconds


@pytest.mark.parametrize("text", ["", "25:00", "18", "soon", "-2h", "18:60", "2 days"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(UsageError, match="is no time"):
        seconds_until(text, NOON)
