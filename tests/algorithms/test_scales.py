"""The scale search for what it promises of every layer, and the closed form against float64 least squares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.algorithms.grids import GridFormat, grid
from llmcompress.algorithms.scales import fit_scales, groups_of, search_scales, spread
from tests.algorithms.test_gptq import lost, nearest, problem

FORMATS: tuple[GridFormat, ...] = ("nf4", "fp4", "q4_0", "iq4_nl")


def absmax(W_RC: Tensor, group_size: int) -> Tensor:
    return groups_of(W_RC, group_size).abs().amax(-1)


def block_errors(W_RC: Tensor, S_RG: Tensor, h_C: Tensor, format: GridFormat) -> Tensor:
    """Weighed squared error of every layer under nearest codes [R, G]."""
    levels, layer = grid(format), W_RC.shape[1] // S_RG.shape[1]
    Q_RC = levels.levels[nearest(W_RC, S_RG, levels)] * spread(S_RG, layer)
    return groups_of((W_RC - Q_RC).square() * h_C, layer).sum(-1)


def some(seed: int, R: int, C: int) -> tuple[Tensor, Tensor]:
    """Weights with outliers, and second moments with dead channels."""
    generator = torch.Generator().manual_seed(seed)
    W_RC = torch.randn(R, C, generator=generator) * torch.randn(R, C, generator=generator).exp() * 0.02
    h_C = torch.randn(C, generator=generator).exp()
    h_C[torch.rand(C, generator=generator) < 0.2] = 0
    return W_RC, h_C


def by_lstsq(W_RC: Tensor, H_CC: Tensor, Q_RC: Tensor, group_size: int) -> Tensor:
    """Row by row in float64: with H = L L^T, the scales s that bring L^T (w - Q s) closest to zero."""
    factor, C = torch.linalg.cholesky(H_CC.double()).T, W_RC.shape[1]
    place = torch.nn.functional.one_hot(
        torch.arange(C) // group_size
    ).double()  # [C, G]: which scale a column has
    A_RCG = factor @ (Q_RC.double()[..., None] * place)
    S_RG: Tensor = torch.linalg.lstsq(A_RCG, (W_RC.double() @ factor.T)[..., None]).solution[..., 0]
    return S_RG


def test_blocks_and_spread_agree_on_which_columns_share_a_scale() -> None:
    W_RC, S_RG = torch.arange(24.0).reshape(2, 12), torch.tensor([[1.0, 10, 100], [2, 20, 200]])
    assert groups_of(W_RC, 4).shape == (2, 3, 4)
    assert torch.equal(groups_of(W_RC, 4) * S_RG[..., None], groups_of(W_RC * spread(S_RG, 4), 4))


def test_a_group_of_zeros_gets_a_scale_next_to_zero_where_no_level_is_zero() -> None:
    W_RC, h_C = some(3, 4, 64)
    W_RC[1, :32], W_RC[2] = 0, 0
    found = {format: search_scales(W_RC, h_C, grid(format), 32) for format in FORMATS}
    zeros = torch.tensor([[0, 0], [1, 0], [1, 1], [0, 0]]).bool()
    assert (found["q4_0"][zeros] == 1).all() and (found["iq4_nl"][zeros] == 1e-6).all()
    assert (found["iq4_nl"][~zeros].abs() > 1e-4).all()


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 9999),
    R=st.integers(1, 6),
    G=st.integers(1, 4),
    group_size=st.sampled_from([1, 4, 32]),
    signed=st.booleans(),
)
def test_in_no_block_is_a_searched_scale_worse_than_absmax(
    format: GridFormat, seed: int, R: int, G: int, group_size: int, signed: bool
) -> None:
    W_RC, h_C = some(seed, R, G * group_size)
    found = search_scales(W_RC, h_C, grid(format), group_size, signed=signed)
    stock = block_errors(W_RC, absmax(W_RC, group_size), h_C, format)
    assert bool((block_errors(W_RC, found, h_C, format) <= stock * (1 + 1e-6)).all())


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 9999),
    R=st.integers(1, 6),
    G=st.integers(1, 4),
    group_size=st.sampled_from([1, 4, 32]),
)
def test_a_free_sign_is_in_no_block_worse_than_none(
    format: GridFormat, seed: int, R: int, G: int, group_size: int
) -> None:
    W_RC, h_C = some(seed, R, G * group_size)
    free, fixed = (
        search_scales(W_RC, h_C, grid(format), group_size, signed=signed) for signed in (True, False)
    )
    assert bool((fixed > 0).all())
    errors = block_errors(W_RC, fixed, h_C, format)
    assert bool((block_errors(W_RC, free, h_C, format) <= errors * (1 + 1e-6)).all())


def test_a_free_sign_pays_on_an_uneven_grid() -> None:
    W_RC, _ = some(0, 32, 64)
    h_C = torch.ones(64)
    free, fixed = (search_scales(W_RC, h_C, grid("nf4"), 64, signed=signed) for signed in (True, False))
    assert bool((free < 0).any())
    assert block_errors(W_RC, free, h_C, "nf4").sum() < 0.98 * block_errors(W_RC, fixed, h_C, "nf4").sum()


@pytest.mark.parametrize("format", FORMATS)
def test_a_block_that_absmax_rounds_without_error_keeps_it(format: GridFormat) -> None:
    levels = grid(format).levels
    W_RC = torch.stack([levels * 0.3, levels.flip(0) * 7])
    assert torch.equal(
        search_scales(W_RC, torch.ones(len(levels)), grid(format), len(levels)), absmax(W_RC, len(levels))
    )


def test_a_block_of_zeros_gets_scale_one_and_one_that_no_input_reaches_its_absmax() -> None:
    W_RC, h_C = some(1, 3, 16)
    W_RC[1, :8] = 0
    h_C[8:] = 0
    found = search_scales(W_RC, h_C, grid("nf4"), 8)
    assert found[1, 0] == 1
    assert torch.equal(found[:, 1], absmax(W_RC, 8)[:, 1])


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e25])
def test_scales_of_tiny_and_huge_weights_are_finite_and_not_zero(size: float) -> None:
    W_RC, h_C = some(2, 4, 16)
    found = search_scales(W_RC * size, h_C, grid("nf4"), 8)
    assert bool((torch.isfinite(found) & (found != 0)).all())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("group_size", [8, 16, 64])
def test_fitted_scales_are_the_least_squares_solution(format: GridFormat, group_size: int) -> None:
    W_RC, H_CC = (x.float() for x in problem(group_size))
    levels = grid(format)
    S_RG = absmax(W_RC, group_size)
    Q_RC = levels.levels[nearest(W_RC, S_RG, levels)]
    fitted = fit_scales(W_RC, H_CC, Q_RC, S_RG)
    torch.testing.assert_close(fitted.double(), by_lstsq(W_RC, H_CC, Q_RC, group_size), rtol=2e-3, atol=1e-4)
    assert not torch.equal(fitted, S_RG)


def test_fitting_finds_the_scales_that_weights_on_the_grid_were_made_with() -> None:
    _, H_CC = problem(1)
    generator = torch.Generator().manual_seed(1)
    Q_RC = grid("nf4").levels[torch.randint(16, (32, 64), generator=generator)]
    true_RG = torch.randn(32, 4, generator=generator)
    start = torch.full((32, 4), 0.01)
    torch.testing.assert_close(
        fit_scales(Q_RC * spread(true_RG, 16), H_CC.float(), Q_RC, start), true_RG, rtol=1e-3, atol=1e-3
    )


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 9999),
    R=st.integers(1, 5),
    G=st.integers(1, 6),
    group_size=st.integers(1, 8),
    tokens=st.integers(1, 60),
    format=st.sampled_from(FORMATS),
)
def test_fitting_never_raises_the_objective(
    seed: int, R: int, G: int, group_size: int, tokens: int, format: GridFormat
) -> None:
    W_RC, H_CC = (x.float() for x in problem(seed, R, G * group_size, tokens))
    levels, S_RG = grid(format), absmax(W_RC, group_size)
    index = nearest(W_RC, S_RG, levels)
    fitted = fit_scales(W_RC, H_CC, levels.levels[index], S_RG)
    whole = float(((W_RC @ H_CC) * W_RC).sum())  # float32 and the ridge of 1e-6 cost some millionths of it
    assert lost(W_RC, index, fitted, H_CC, levels) <= lost(W_RC, index, S_RG, H_CC, levels) + 2e-5 * whole


def test_rows_solved_in_parts_are_the_same_as_at_once() -> None:
    R, C = 40, 768  # 768 scales a row: parts of 28 rows
    W_RC, H_CC = (x.float() for x in problem(2, R, C, 1000))
    S_RG = absmax(W_RC, 1)
    Q_RC = grid("nf4").levels[nearest(W_RC, S_RG * 1.3, grid("nf4"))]
    together = fit_scales(W_RC, H_CC, Q_RC, S_RG)
    apart = torch.cat(
        [fit_scales(W_RC[r : r + 8], H_CC, Q_RC[r : r + 8], S_RG[r : r + 8]) for r in range(0, R, 8)]
    )
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-5)
    assert not torch.equal(together, S_RG)


def test_a_row_with_an_empty_block_keeps_its_scales_and_the_others_are_fitted() -> None:
    W_RC, H_CC = (x.float() for x in problem(3))
    levels, S_RG = grid("nf4"), absmax(W_RC, 16)
    index = nearest(W_RC, S_RG, levels)
    whole = fit_scales(W_RC, H_CC, levels.levels[index], S_RG)
    index[5, 16:32] = 7  # the level zero
    fitted = fit_scales(W_RC, H_CC, levels.levels[index], S_RG)
    others = torch.arange(32) != 5
    assert torch.equal(fitted[5], S_RG[5])
    torch.testing.assert_close(fitted[others], whole[others])


@pytest.mark.parametrize("case", ["no weight", "no input", "not a number"])
def test_where_there_is_nothing_to_fit_the_scales_stay(case: str) -> None:
    W_RC, H_CC = (x.float() for x in problem(4))
    levels, S_RG = grid("nf4"), absmax(W_RC, 16)
    Q_RC = levels.levels[nearest(W_RC, S_RG, levels)]
    if case == "no weight":
        W_RC, Q_RC = torch.zeros_like(W_RC), torch.zeros_like(Q_RC)
    elif case == "no input":
        H_CC = torch.zeros_like(H_CC)
    else:
        H_CC[0, 0] = float("nan")
    assert torch.equal(fit_scales(W_RC, H_CC, Q_RC, S_RG), S_RG)
