"""Scales as a step a row times whole multipliers, against a search in float64, and the grids of whole
numbers."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.algorithms.grids import LARGEST, grid
from llmcompress.algorithms.scales import integer_scales

Whole = Literal["int4", "int8"]
WHOLE: tuple[Whole, ...] = ("int4", "int8")
by_format = pytest.mark.parametrize("format", WHOLE)
many = settings(max_examples=60, deadline=None, derandomize=True)
shapes = {
    "seed": st.integers(0, 9999),
    "R": st.integers(1, 6),
    "G": st.integers(1, 12),
    "largest": st.sampled_from([1, 2, 7, 18]),
}


def some(seed: int, R: int, G: int) -> Tensor:
    """Positive scales, in some rows close to each other, in others over orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(R, G, generator=generator) * torch.rand(R, 1, generator=generator) * 2).exp() * 0.01


def product(S_RG: Tensor, largest: int) -> Tensor:
    step_R, multiplier_RG = integer_scales(S_RG, largest)
    return step_R[:, None] * multiplier_RG


def floored(S_RG: Tensor, largest: int) -> Tensor:
    """The scales in float64, none below half of the finest step that a row can have."""
    return S_RG.double().maximum(S_RG.double().amax(1, keepdim=True) / (2 * largest))


def least(S_RG: Tensor, largest: int) -> list[float]:
    """For each row, the least sum of squared relative errors with the largest scale at any multiplier above
    half of all."""
    rows = []
    for row in floored(S_RG, largest).tolist():
        tried = []
        for count in range(largest // 2 + 1, largest + 1):
            step = max(row) / count
            tried.append(
                sum(min((m * step / scale - 1) ** 2 for m in range(1, largest + 1)) for scale in row)
            )
        rows.append(min(tried))
    return rows


@many
@given(**shapes)
def test_multipliers_are_whole_and_in_range_and_the_largest_is_above_half_of_all(
    seed: int, R: int, G: int, largest: int
) -> None:
    S_RG = some(seed, R, G)
    step_R, multiplier_RG = integer_scales(S_RG, largest)
    assert step_R.shape == (R,) and multiplier_RG.shape == (R, G)
    assert bool((step_R > 0).all() and step_R.isfinite().all())
    assert torch.equal(multiplier_RG, multiplier_RG.long().float())
    assert bool(((multiplier_RG >= 1) & (multiplier_RG <= largest)).all())
    assert bool((multiplier_RG.gather(1, S_RG.argmax(1, keepdim=True)) > largest // 2).all())


@many
@given(**shapes)
def test_no_product_is_further_from_its_scale_than_half_a_step(
    seed: int, R: int, G: int, largest: int
) -> None:
    S_RG = some(seed, R, G)
    step_R = integer_scales(S_RG, largest)[0].double()[:, None]
    off = (product(S_RG, largest).double() - S_RG.double()).abs()
    reached = S_RG.double() >= step_R / 2  # a smaller scale has nothing nearer than one step
    assert bool((off[reached] <= (step_R * (0.5 + 1e-5)).expand_as(off)[reached]).all())
    assert bool((off <= step_R * (1 + 1e-5)).all())
    assert bool((step_R * (largest // 2 + 1) <= S_RG.double().amax(1, keepdim=True) * (1 + 1e-6)).all())


@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
def test_a_scale_is_off_by_no_more_than_half_a_step_of_its_own_multiplier(ratio: int) -> None:
    """With 18 steps the largest has 10 or more: a scale that is 1 / ratio of it is off by less than ratio /
    20 of itself."""
    S_RG = some(0, 400, 8)
    wide = S_RG.amax(1, keepdim=True) <= S_RG * ratio
    error = (product(S_RG, 18).double() / S_RG.double() - 1).abs()
    assert float(error[wide].max()) <= ratio / 20 + 1e-6


@many
@given(**shapes)
def test_the_relative_errors_of_a_row_are_the_least_that_a_search_of_all_multipliers_finds(
    seed: int, R: int, G: int, largest: int
) -> None:
    S_RG = some(seed, R, G)
    error_R = (product(S_RG, largest).double() / floored(S_RG, largest) - 1).square().sum(1)
    torch.testing.assert_close(
        error_R, torch.tensor(least(S_RG, largest), dtype=torch.float64), rtol=1e-4, atol=1e-8
    )


@many
@given(seed=st.integers(0, 9999), top=st.integers(10, 18))
def test_scales_that_a_step_and_multipliers_can_say_are_said_exactly(seed: int, top: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    multiplier_RG = torch.randint(1, top + 1, (5, 9), generator=generator)
    multiplier_RG[:, 4] = top
    S_RG = multiplier_RG * torch.rand(5, 1, generator=generator).add(0.01)
    torch.testing.assert_close(product(S_RG, 18), S_RG, rtol=3e-7, atol=0)


@many
@given(**shapes)
def test_snapping_twice_is_snapping_once(seed: int, R: int, G: int, largest: int) -> None:
    # another step may say the same: the product stays, not its factors
    once = product(some(seed, R, G), largest)
    torch.testing.assert_close(product(once, largest), once, rtol=3e-7, atol=0)


@many
@given(**shapes)
def test_the_same_scales_give_the_same_bits_alone_among_others_and_at_other_powers_of_two(
    seed: int, R: int, G: int, largest: int
) -> None:
    S_RG = some(seed, R, G)
    step_R, multiplier_RG = integer_scales(S_RG, largest)
    again = integer_scales(S_RG.clone(), largest)
    assert torch.equal(step_R, again[0]) and torch.equal(multiplier_RG, again[1])
    alone = integer_scales(S_RG[-1:], largest)
    assert torch.equal(step_R[-1:], alone[0]) and torch.equal(multiplier_RG[-1:], alone[1])
    larger = integer_scales(S_RG * 1024, largest)
    assert torch.equal(step_R * 1024, larger[0]) and torch.equal(multiplier_RG, larger[1])


@many
@given(**shapes)
def test_scales_of_zero_and_below_get_the_least_that_a_row_can_say(
    seed: int, R: int, G: int, largest: int
) -> None:
    S_RG = some(seed, R, G)
    lost = torch.rand(R, G, generator=torch.Generator().manual_seed(seed)) < 0.4
    lost &= S_RG.amax(1, keepdim=True) > S_RG
    found = product(torch.where(lost, -S_RG, S_RG), largest)
    step_R, multiplier_RG = integer_scales(torch.where(lost, torch.zeros_like(S_RG), S_RG), largest)
    assert torch.equal(found, step_R[:, None] * multiplier_RG)
    assert bool((multiplier_RG[lost] == 1).all())


@pytest.mark.parametrize(
    "row",
    [
        [0.0, 0.0, 0.0],
        [-1.0, -2.0, -0.5],
        [-10.0, 1.0, 2.0],
        [1e-45, 0.0, 1e-44],
        [3e38, 1e-38, -3e38],
        [1e-30, 2e-30, 0.0],
    ],
)
def test_whatever_the_scales_are_steps_are_positive_and_finite_and_multipliers_in_range(
    row: list[float],
) -> None:
    step_R, multiplier_RG = integer_scales(torch.tensor([row, [1.0, 2.0, 3.0]]), 18)
    assert bool((step_R > 0).all() and step_R.isfinite().all())
    assert bool(
        ((multiplier_RG >= 1) & (multiplier_RG <= 18) & (multiplier_RG == multiplier_RG.round())).all()
    )
    assert bool((step_R[:, None] * multiplier_RG).isfinite().all())
    alone = integer_scales(torch.tensor([[1.0, 2.0, 3.0]]), 18)
    assert torch.equal(step_R[1:], alone[0]) and torch.equal(multiplier_RG[1:], alone[1])


@by_format
def test_the_levels_of_whole_numbers_are_their_codes_over_the_largest(format: Whole) -> None:
    ours, largest = grid(format), {"int4": 7, "int8": 127}[format]
    assert LARGEST[format] == largest
    assert ours.codes.dtype == torch.int8
    assert ours.codes.tolist() == list(range(-largest, largest + 1))
    torch.testing.assert_close(ours.levels.double(), ours.codes.double() / largest, rtol=6e-8, atol=0)
    assert ours.levels[[0, largest, -1]].tolist() == [-1, 0, 1]
    assert torch.equal(ours.levels, -ours.levels.flip(0))


@by_format
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31))
def test_nearest_is_plain_rounding(format: Whole, seed: int) -> None:
    ours, largest = grid(format), LARGEST[format]
    x = torch.randn(4000, generator=torch.Generator().manual_seed(seed)) * 0.6  # some lie beyond the grid
    fine = x.double() * largest
    sure = ((fine - fine.floor()) - 0.5).abs() > 1e-4  # in the very middle both neighbours are right
    codes = ours.codes[ours.nearest(x)].long()
    assert torch.equal(codes[sure], fine.round().clamp(-largest, largest).long()[sure])
    assert bool(((codes - fine.clamp(-largest, largest)).abs() <= 0.5 + 1e-4).all())


@by_format
def test_a_level_is_its_own_nearest_and_position_and_has_even_spacing(format: Whole) -> None:
    ours = grid(format)
    every = torch.arange(len(ours.levels))
    assert torch.equal(ours.nearest(ours.levels), every)
    assert torch.equal(ours.position(ours.levels), every.float())
    torch.testing.assert_close(
        ours.spacing(every), torch.full((len(every),), 1 / LARGEST[format]), rtol=1e-4, atol=0
    )


@by_format
def test_a_position_is_the_number_itself_counted_from_the_lowest_code(format: Whole) -> None:
    x, largest = torch.linspace(-1.2, 1.2, 5001), LARGEST[format]
    expected = (x.double() * largest).clamp(-largest, largest) + largest
    torch.testing.assert_close(grid(format).position(x).double(), expected, rtol=0, atol=1e-4)
