"""Error feedback over all depths and refinement: smaller output errors than rounding at shallow depths."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mbq_export.format.codes import Sliced, decode, with_scales
from mbq_export.slicing import nested, rtn
from mbq_export.slicing.columns import DEEP, DEEP_LATER
from mbq_export.slicing.refine import refine
from mbq_runtime.bundle.slice_profile import SliceProfile
from mbq_runtime.errors import ModelError

Case = tuple[NDArray[np.float32], torch.Tensor]


@pytest.fixture(scope="module")
def case() -> Case:
    """A weight [96, 256], and the second moments of correlated inputs with a few large channels."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 256)) @ rng.normal(size=(256, 256)) * np.exp(rng.normal(size=256))
    return rng.normal(size=(96, 256)).astype(np.float32), torch.from_numpy(x.T @ x / len(x))


def output_error(
    weight: NDArray[np.float32], hessian: torch.Tensor, sliced: Sliced, depth: int, profile: SliceProfile
) -> float:
    difference = decode(sliced, profile, depth) - weight
    return float(np.einsum("nk,kl,nl->", difference, hessian.numpy(), difference))


@pytest.mark.parametrize("slices", [(3, 1, 2, 2), (2, 2, 2, 2), (8,)])
def test_shallow_depths_gain_and_deep_ones_stay_small(case: Case, slices: tuple[int, ...]) -> None:
    weight, hessian = case
    profile = SliceProfile(slices)
    found = nested.slice_weight(weight, hessian, 64, profile, "layer")
    rounded = rtn.slice_weight(weight, 64, profile, "layer")
    gains = [
        output_error(weight, hessian, rounded, depth, profile) / output_error(weight, hessian, found, depth, profile)
        for depth in range(1, profile.depths + 1)
    ]
    if profile.depths == 1:
        assert gains[0] > 1.4  # plain GPTQ
        return
    assert gains[0] > 1.1
    deepest = output_error(weight, hessian, found, profile.depths, profile)
    assert deepest < 0.05 * output_error(weight, hessian, found, 1, profile)


@pytest.mark.parametrize("slices", [(3, 1, 2, 2), (2, 2, 2, 2), (8,)])
def test_refinement_lowers_the_error(case: Case, slices: tuple[int, ...]) -> None:
    weight, hessian = case
    profile, metric = SliceProfile(slices), nested.damped(hessian)
    found = [nested.slice_weight(weight, hessian, 64, profile, "layer")]
    found += [refine(weight, hessian, found[0], profile, sweeps) for sweeps in (1, 3)]
    errors = np.array(
        [
            [output_error(weight, metric, sliced, depth, profile) for depth in range(1, profile.depths + 1)]
            for sliced in found
        ]
    )
    # Stored scales are rounded, so the limits leave some room.  The deepest depth may pay for the others.
    total = errors @ [2.0 ** (DEEP * bits) for bits in profile.depth_bits]
    assert total[1] < 0.96 * total[0]
    assert total[2] < 0.98 * total[1]
    shallow = slice(max(1, profile.depths - 1))
    assert (errors[1, shallow] < 0.96 * errors[0, shallow]).all()
    assert (errors[2, shallow] < 0.98 * errors[1, shallow]).all()


def test_shallow_depths_gain_where_fine_bits_are_chosen_again(case: Case) -> None:
    weight, hessian = case
    profile = SliceProfile((3, 1, 2, 2))
    metric = nested.damped(hessian)
    errors = []
    for deep in (DEEP, DEEP_LATER):
        fed_back = nested.slice_weight(weight, hessian, 64, profile, "layer", deep=deep)
        found = refine(weight, hessian, fed_back, profile, 3, deep=deep)
        errors.append([output_error(weight, metric, found, depth, profile) for depth in (1, profile.depths)])
    assert errors[1][0] < 0.97 * errors[0][0]
    assert errors[1][1] > errors[0][1]


def test_refinement_leaves_what_cannot_be_better(case: Case) -> None:
    """Weights that full depth represents exactly stay exact, also in a constant group."""
    rng = np.random.default_rng(1)
    profile = SliceProfile((8,))
    sliced = Sliced(
        rng.integers(0, 256, (32, 256)).astype(np.uint8),
        np.full((32, 4), 128, np.uint8),
        np.full((32, 4), 128, np.uint8),
        np.ones((32, 1), np.float16),
    )
    sliced.codes[:, :64] = 7
    refined = refine(decode(sliced, profile, 1).astype(np.float32), case[1], sliced, profile, 2)
    for field in fields(Sliced):
        np.testing.assert_array_equal(getattr(refined, field.name), getattr(sliced, field.name))


def test_residuals_are_chosen_for_scales_that_only_the_base_slice_wanted(case: Case) -> None:
    weight, hessian = case
    profile = SliceProfile((2, 2, 2, 2))
    found = refine(weight, hessian, nested.slice_weight(weight, hessian, 64, profile, "layer"), profile, 1)
    moved = with_scales(found, found.scale * np.float32(0.96), found.offset)
    fed_back = nested.slice_weight(weight, hessian, 64, profile, "layer", earlier=moved, kept_bits=2)
    chosen = refine(weight, hessian, fed_back, profile, 1, kept_bits=2)
    for name in ("scale_codes", "zero_codes", "row_scale"):
        np.testing.assert_array_equal(getattr(chosen, name), getattr(moved, name))
    np.testing.assert_array_equal(chosen.codes >> 6, moved.codes >> 6)
    before, after = (
        [output_error(weight, hessian, sliced, depth, profile) for depth in (3, 4)] for sliced in (moved, chosen)
    )
    assert after[0] < 0.7 * before[0]
    assert after[1] < 0.5 * before[1]


def test_rows_do_not_depend_on_each_other(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = SliceProfile((3, 1, 2, 2))
    found = nested.slice_weight(*case, 64, profile, "layer")
    whole = refine(*case, found, profile, 1)
    monkeypatch.setattr("mbq_export.slicing.refine.ROWS", 40)
    parts = refine(*case, found, profile, 1)
    assert (whole.codes != parts.codes).mean() < 0.01  # products of another width round differently


def test_slices_that_are_given_stay_as_they_are(case: Case) -> None:
    """For a single row, whose transpose is the same memory."""
    weight, hessian = case[0][:1], case[1]
    profile = SliceProfile((3, 1, 2, 2))
    given = nested.slice_weight(weight, hessian, 64, profile, "layer")
    before = given.codes.copy()
    assert (refine(weight, hessian, given, profile, 1).codes != before).any()
    np.testing.assert_array_equal(given.codes, before)


def test_the_same_twice(case: Case) -> None:
    profile = SliceProfile((3, 1, 2, 2))
    first, second = (nested.slice_weight(*case, 64, profile, "layer") for _ in range(2))
    np.testing.assert_array_equal(first.codes, second.codes)
    np.testing.assert_array_equal(first.scale, second.scale)


def test_inputs_that_are_never_active_do_no_harm(case: Case) -> None:
    weight, hessian = case
    hessian = hessian.clone()
    hessian[:, :64] = hessian[:64] = 0
    profile = SliceProfile((3, 1, 2, 2))
    found = nested.slice_weight(weight, hessian, 64, profile, "layer")
    assert np.isfinite(found.scale.astype(np.float32)).all()
    rounded = rtn.slice_weight(weight, 64, profile, "layer")
    dead = np.abs(decode(found, profile, 4)[:, :64] - weight[:, :64]).max()
    assert dead <= 1.03 * np.abs(decode(rounded, profile, 4)[:, :64] - weight[:, :64]).max()


def test_a_covariance_that_is_not_one_is_refused(case: Case) -> None:
    with pytest.raises(ModelError, match=r"layers\.3\.mlp_in.*--calib-tokens"):
        nested.slice_weight(case[0], -case[1], 64, SliceProfile((8,)), "layers.3.mlp_in")
