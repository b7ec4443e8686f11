"""The compiled loops over columns against torch's operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mbq_export.slicing import columns
from mbq_export.slicing.columns import Grid
from mbq_runtime.bundle.slice_profile import SliceProfile

ROWS, SIZE = 203, 64  # the last rows do not fill a vector
CASES = [((3, 1, 2, 2), 0), ((2, 2, 2, 2), 0), ((2, 2, 2, 2), 2), ((1,) * 8, 0), ((8,), 0)]

Loop = Callable[[], tuple[torch.Tensor, torch.Tensor]]


def feeding_back(profile: SliceProfile, kept_bits: int) -> Loop:
    generator = torch.Generator().manual_seed(0)
    grid = Grid(profile, kept_bits, torch.device("cpu"))
    # Strided as columns of a wider matrix.  The first row is a group of equal weights.
    streams = torch.randn(grid.depths, 3 * SIZE, ROWS, generator=generator)[:, SIZE : 2 * SIZE]
    factor = torch.randn(SIZE, SIZE, generator=generator).mul_(0.2).triu(1) + torch.eye(SIZE)
    scale = torch.rand(ROWS, generator=generator) + 0.5
    scale[0], streams[:, :, 0] = 0, 0.25
    offset = torch.full([ROWS], 0.25)
    codes = torch.randint(0, 256, (SIZE, ROWS), dtype=torch.uint8, generator=generator)

    def loop() -> tuple[torch.Tensor, torch.Tensor]:
        given, found = streams.clone(), codes.clone()
        errors = columns.feed_back(grid, streams, factor, found, scale=scale, offset=offset)
        torch.testing.assert_close(streams, given, rtol=0, atol=0)
        if kept_bits:
            assert torch.equal(found >> (8 - kept_bits), codes >> (8 - kept_bits))
        return found, errors

    return loop


def settling(profile: SliceProfile, kept_bits: int) -> Loop:
    generator = torch.Generator().manual_seed(1)
    grid = Grid(profile, kept_bits, torch.device("cpu"))
    inputs = torch.randn(4 * SIZE, SIZE, generator=generator)
    own = inputs.T @ inputs / len(inputs)
    scale = torch.rand(ROWS, generator=generator) + 0.5
    scale[0] = 0
    codes = torch.randint(0, 256, (SIZE, ROWS), dtype=torch.uint8, generator=generator)
    pull = torch.randn(grid.depths, SIZE, ROWS, generator=generator)

    def loop() -> tuple[torch.Tensor, torch.Tensor]:
        found, values = codes.clone(), grid.in_base_cells(codes)
        columns.settle(grid, found, values, curvature=own, scale=scale, pull=pull.clone())
        torch.testing.assert_close(values, grid.in_base_cells(found), rtol=0, atol=0)
        if kept_bits:
            assert torch.equal(found >> (8 - kept_bits), codes >> (8 - kept_bits))
        return found, values

    return loop


@pytest.mark.parametrize("make", [feeding_back, settling])
@pytest.mark.parametrize(("slices", "kept_bits"), CASES)
def test_compiled_loops_choose_the_codes_of_torchs_operations(
    make: Callable[[SliceProfile, int], Loop], slices: tuple[int, ...], kept_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make(SliceProfile(slices), kept_bits)
    assert columns._compiled(torch.device("cpu")) is not None
    codes, others = loop()
    monkeypatch.setattr(columns, "_compiled", lambda device: None)
    expected_codes, expected = loop()
    # Between two equally good codes a sum that rounds differently takes the other, and all later ones differ.
    same = (codes == expected_codes).all(0)
    assert same.sum() >= ROWS - 2
    torch.testing.assert_close(others[..., same], expected[..., same], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [feeding_back, settling])
def test_threads_do_not_change_what_is_chosen(make: Callable[[SliceProfile, int], Loop]) -> None:
    loop, threads = make(SliceProfile((3, 1, 2, 2)), 0), torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(loop())
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*found, strict=True):
        torch.testing.assert_close(one, three, rtol=0, atol=0)
