"""Codebooks of all rows together: against their plain forms and for what they promise, in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmcompress.algorithms.codebook import Palette, descend, fit_levels, look_up, nearest, solve_codebook
from llmcompress.algorithms.two_sided import diagonal, loss, weighed
from llmcompress.algorithms.two_sided_codebook import descend_codes, fit_levels_together, solve_together
from tests.algorithms.test_codebook import half, levels_of
from tests.algorithms.test_gptq import problem
from tests.algorithms.test_two_sided import fisher

R, L = 10, 8


def start(rows: int, seed: int = 3) -> tuple[Tensor, Tensor, Tensor, Palette]:
    """Weights, moments, Fisher matrix, and the nearest of random levels."""
    W_RC, H_CC = problem(seed, R, 40)
    levels_GL = levels_of(seed, -(-R // rows), L)
    return W_RC, H_CC, fisher(R), Palette(nearest(W_RC, levels_GL, rows), levels_GL, rows)


def lost(W_RC: Tensor, H_CC: Tensor, F_RR: Tensor, palette: Palette) -> float:
    return float(loss(W_RC - palette.weight(), H_CC, F_RR))


def plain(W_RC: Tensor, H_CC: Tensor, F_RR: Tensor, palette: Palette) -> Tensor:
    """One pass, weight by weight, each to the level of the least loss."""
    index = palette.index_RC.clone()
    for c, r in itertools.product(range(W_RC.shape[1]), range(R)):
        tried = []
        for level in range(L):
            index[r, c] = level
            tried.append(lost(W_RC, H_CC, F_RR, Palette(index, palette.levels_GL, palette.rows)))
        index[r, c] = tried.index(min(tried))
    return index


@pytest.mark.parametrize("rows", [1, 3, 10])
def test_codes_move_to_the_level_of_the_least_loss_one_by_one(rows: int) -> None:
    W_RC, H_CC, F_RR, palette = start(rows)
    found = descend_codes(W_RC, H_CC, F_RR, palette, passes=1)
    assert torch.equal(found.index_RC, plain(W_RC, H_CC, F_RR, palette))
    assert not torch.equal(found.index_RC, palette.index_RC)


def test_codes_of_rows_that_do_not_weigh_each_other_descend_alone() -> None:
    W_RC, H_CC, _, palette = start(3)
    weigh_R = torch.rand(R, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.1
    found = descend_codes(W_RC, H_CC, weigh_R.diag(), palette, passes=1)
    assert torch.equal(found.index_RC, descend(W_RC, H_CC, palette.index_RC, palette.levels_GL, 3))


@pytest.mark.parametrize("rows", [1, 3, 10])
def test_fitted_levels_solve_the_normal_equations(rows: int) -> None:
    W_RC, H_CC, F_RR, palette = start(rows)
    palette.levels_GL[0, -1] = 9.0  # which no weight takes
    palette = replace(palette, index_RC=nearest(W_RC, palette.levels_GL, rows))
    found = fit_levels_together(W_RC, H_CC, F_RR, palette, steps=400)
    book_R = torch.arange(R) // rows
    B = torch.zeros(R, W_RC.shape[1], palette.levels_GL.numel(), dtype=torch.float64)
    B.scatter_(2, (palette.index_RC + book_R[:, None] * L)[..., None], 1)
    weighs = torch.kron(F_RR, H_CC)
    B = B.flatten(0, 1)
    used = B.any(0)
    expected = torch.linalg.solve(B.T @ weighs @ B + (~used).double().diag(), B.T @ weighs @ W_RC.flatten())
    torch.testing.assert_close(found.flatten()[used], expected[used], rtol=1e-5, atol=1e-8)
    assert float(found[0, -1]) == 9.0


def test_levels_of_rows_that_do_not_weigh_each_other_are_fitted_alone() -> None:
    W_RC, H_CC, _, palette = start(1)
    F_RR = torch.eye(R, dtype=torch.float64)
    found = fit_levels_together(W_RC, H_CC, F_RR, palette, steps=400)
    alone = fit_levels(W_RC, H_CC, palette.index_RC, palette.levels_GL, 1, steps=60)
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-8)


def test_no_step_of_a_fit_raises_the_loss() -> None:
    W_RC, H_CC, F_RR, palette = start(3)
    after = []
    for steps in range(8):
        levels_GL = fit_levels_together(W_RC, H_CC, F_RR, palette, steps=steps)
        after.append(lost(W_RC, H_CC, F_RR, Palette(palette.index_RC, levels_GL, 3)))
    assert after[-1] < 0.9 * after[0]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(after))


def test_codes_and_levels_of_blocks_of_rows_are_found_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    W_RC, H_CC, _, palette = start(2)
    monkeypatch.setattr("llmcompress.algorithms.two_sided.TOGETHER", 8)
    F_RB = torch.cat([fisher(8), torch.zeros(2, 8, dtype=torch.float64)])
    F_RB[8:, :2] = fisher(2, seed=1)
    found = descend_codes(W_RC, H_CC, F_RB, palette)
    levels_GL = fit_levels_together(W_RC, H_CC, F_RB, found, steps=400)
    for rows, F_RR in ((slice(0, 8), fisher(8)), (slice(8, 10), fisher(2, seed=1))):
        books = slice(rows.start // 2, rows.stop // 2)
        own = Palette(palette.index_RC[rows], palette.levels_GL[books], 2)
        alone = descend_codes(W_RC[rows], H_CC, F_RR, own)
        assert torch.equal(found.index_RC[rows], alone.index_RC)
        fitted = fit_levels_together(W_RC[rows], H_CC, F_RR, alone, steps=400)
        torch.testing.assert_close(levels_GL[books], fitted, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(diagonal(F_RB)[8:], fisher(2, seed=1).diagonal())
    assert torch.equal(weighed(F_RB, W_RC)[8:], fisher(2, seed=1) @ W_RC[8:])


@pytest.mark.parametrize("rows", [1, 4, 32])
def test_codebooks_solved_under_the_fisher_matrix_lose_less_by_it_and_stay_storable(rows: int) -> None:
    W_RC, H_CC = problem(5)
    F_RR = fisher(len(W_RC))
    alone = solve_codebook(W_RC, H_CC, L, rows, snap=half)
    found = solve_together(W_RC, H_CC, F_RR, alone, snap=half)
    assert lost(W_RC, H_CC, F_RR, found) < 0.8 * lost(W_RC, H_CC, F_RR, alone)
    assert torch.equal(half(found.levels_GL), found.levels_GL)
    assert torch.equal(found.levels_GL.sort(dim=1).values, found.levels_GL)
    again = solve_together(W_RC, H_CC, F_RR, found, snap=half)
    assert lost(W_RC, H_CC, F_RR, again) <= lost(W_RC, H_CC, F_RR, found), "the best so far is kept"


def test_values_that_fit_come_back_bit_for_bit() -> None:
    levels_GL = half(levels_of(1, R, L))
    index = torch.randint(L, (R, 40), generator=torch.Generator().manual_seed(0))
    W_RC = look_up(index, levels_GL, 1)
    found = solve_together(W_RC, problem(3, R, 40)[1], fisher(R), Palette(index, levels_GL, 1), snap=half)
    assert torch.equal(found.weight(), W_RC)
