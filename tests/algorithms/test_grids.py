"""The sorted grids against bitsandbytes' own tables, and the arithmetic of nearest levels and positions."""

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.algorithms.grids import grid
from llmcompress.formats import bitsandbytes_layout

Table = Literal["nf4", "fp4"]  # of bitsandbytes
FORMATS: tuple[Table, ...] = ("nf4", "fp4")


def points(seed: int, count: int = 2000) -> Tensor:
    """In and beyond the grid, a third of them close to zero, where fp4's levels are dense."""
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.6
    x[::3] *= 0.01
    return x


def bits(x: Tensor) -> list[int]:
    return x.contiguous().view(torch.int32).tolist()


@pytest.mark.parametrize("format", FORMATS)
def test_every_code_decodes_to_its_level_bit_for_bit(format: Table) -> None:
    ours = grid(format)
    assert bits(bitsandbytes_layout.grid(format)[ours.codes.int()]) == bits(ours.levels)


@pytest.mark.parametrize("format", FORMATS)
def test_no_level_of_bitsandbytes_is_missing(format: Table) -> None:
    assert set(bitsandbytes_layout.grid(format).tolist()) == set(grid(format).levels.tolist())


@pytest.mark.parametrize("format", FORMATS)
def test_levels_ascend_without_doubles_from_minus_one_to_one(format: Table) -> None:
    levels = grid(format).levels
    assert bool((levels.diff() > 0).all())
    assert levels[[0, -1]].tolist() == [-1, 1]


def test_nf4_has_sixteen_levels_in_code_order() -> None:
    assert grid("nf4").codes.tolist() == list(range(16))


def test_fp4_has_fifteen_levels_and_writes_zero_as_code_zero() -> None:
    ours = grid("fp4")
    assert len(ours.levels) == 15
    assert int(ours.codes[ours.levels == 0]) == 0


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31))
def test_nearest_is_the_closest_of_all_codes(format: Table, seed: int) -> None:
    ours, x = grid(format), points(seed).double()
    distance = (x[:, None] - bitsandbytes_layout.grid(format).double()).abs()
    found = (x - ours.levels.double()[ours.nearest(x.float())]).abs()
    # a middle is rounded to float32, as x may be that close to it
    assert bool((found <= distance.amin(1) + 6e-8).all())


@pytest.mark.parametrize("format", FORMATS)
def test_nearest_takes_any_shape_and_layout(format: Table) -> None:
    ours, x = grid(format), points(0, 24).reshape(4, 6)
    assert torch.equal(ours.nearest(x.T), ours.nearest(x).T)
    assert ours.nearest(x[:0]).shape == (0, 6)


@pytest.mark.parametrize("format", FORMATS)
def test_a_level_is_its_own_nearest(format: Table) -> None:
    ours = grid(format)
    assert ours.nearest(ours.levels).tolist() == list(range(len(ours.levels)))


@pytest.mark.parametrize("format", FORMATS)
def test_what_lies_beyond_the_grid_goes_to_its_ends(format: Table) -> None:
    ours, far = grid(format), torch.tensor([-float("inf"), -3e38, -1.01, 1.01, 3e38, float("inf")])
    top = len(ours.levels) - 1
    assert ours.nearest(far).tolist() == [0, 0, 0, top, top, top]
    assert ours.position(far).tolist() == [0, 0, 0, top, top, top]


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31))
def test_rounding_a_position_is_rounding_to_the_nearest_level(format: Table, seed: int) -> None:
    ours, x = grid(format), points(seed)
    between = (x[:, None] - ours.middles).abs().amin(1) > 1e-6  # in the very middle both are right
    assert torch.equal(ours.position(x).round().long()[between], ours.nearest(x)[between])


@pytest.mark.parametrize("format", FORMATS)
def test_the_position_of_a_level_is_its_index(format: Table) -> None:
    ours = grid(format)
    assert ours.position(ours.levels).tolist() == list(range(len(ours.levels)))


@pytest.mark.parametrize("format", FORMATS)
def test_a_position_rises_with_x_and_is_half_way_in_the_middles(format: Table) -> None:
    ours, x = grid(format), torch.linspace(-1.1, 1.1, 4001)
    assert bool((ours.position(x).diff() >= 0).all())
    torch.testing.assert_close(
        ours.position(ours.middles), torch.arange(len(ours.middles)) + 0.5, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31))
def test_interpolating_between_the_levels_undoes_a_position(format: Table, seed: int) -> None:
    ours, x = grid(format), points(seed).clamp(-1, 1)
    position = ours.position(x)
    below = position.floor().long().clamp(max=len(ours.levels) - 2)
    again = torch.lerp(ours.levels[below], ours.levels[below + 1], position - below)
    torch.testing.assert_close(again, x, rtol=0, atol=2e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_the_spacing_of_a_level_is_the_mean_way_to_its_neighbours(format: Table) -> None:
    ours = grid(format)
    levels = ours.levels.tolist()
    inner = [(after - before) / 2 for before, after in zip(levels[:-2], levels[2:], strict=True)]
    expected = torch.tensor([levels[1] - levels[0], *inner, levels[-1] - levels[-2]])
    torch.testing.assert_close(ours.spacing(torch.arange(len(levels))), expected)


def test_a_grid_moves_to_a_device_whole() -> None:
    moved = grid("fp4").to("meta")
    assert all(tensor.is_meta for tensor in (moved.levels, moved.middles, moved.codes))


def test_the_nearest_level_of_an_even_grid_is_found_by_rounding_as_by_search() -> None:
    int8, int4, nf4 = grid("int8"), grid("int4"), grid("nf4")
    assert (int8.largest, int4.largest, nf4.largest) == (127, 7, 0)
    generator = torch.Generator().manual_seed(0)
    x = torch.cat(
        [2 * torch.rand(100_000, generator=generator) - 1, int8.levels, torch.tensor([-3.0, 3.0, torch.nan])]
    )
    assert torch.equal(int8.nearest(x), torch.bucketize(x, int8.middles))
    halves = torch.tensor([-126.5, -0.5, 0.5, 126.5]) / 128  # exact in float32, as are their products
    assert torch.equal(int8.nearest(halves * (128 / 127)), torch.tensor([0, 126, 127, 253]))
