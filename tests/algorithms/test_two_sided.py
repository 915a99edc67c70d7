"""The descent over all rows together, against its plain form and for what it promises, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from llmcompress.algorithms.gptq import descend
from llmcompress.algorithms.grids import Grid, GridFormat, grid
from llmcompress.algorithms.quantize_weight import solve
from llmcompress.algorithms.scales import search_scales, spread
from llmcompress.algorithms.two_sided import TOGETHER, add_blocks, damped_blocks, descend_together, loss
from tests.algorithms.test_gptq import nearest, precise, problem

FORMATS: tuple[GridFormat, ...] = ("nf4", "int4", "q4_0")


def fisher(R: int, seed: int = 0, tokens: int = 64) -> Tensor:
    """The Fisher matrix of outputs whose gradients share a few directions, damped, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(4, R, generator=generator, dtype=torch.float64)
    G_TR = torch.randn(tokens, 4, generator=generator, dtype=torch.float64) @ mix
    G_TR += 0.3 * torch.randn(tokens, R, generator=generator, dtype=torch.float64)
    F_RR = torch.zeros(R, min(R, TOGETHER), dtype=torch.float64)
    add_blocks(F_RR, G_TR)
    return damped_blocks(F_RR / tokens)


def start(format: GridFormat, R: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor, Grid]:
    """Weights, moments, nearest codes, scales of groups of 32 columns, and the grid."""
    levels = precise(format)
    W_RC, H_CC = problem(3, R=R)
    S_RG = search_scales(W_RC, H_CC.diagonal(), levels, 32)
    return W_RC, H_CC, nearest(W_RC, S_RG, levels), S_RG, levels


def errors(W_RC: Tensor, index_RC: Tensor, S_RG: Tensor, levels: Grid) -> Tensor:
    return W_RC - levels.levels[index_RC] * spread(S_RG, W_RC.shape[1] // S_RG.shape[1])


def plain(
    W_RC: Tensor, H_CC: Tensor, F_RR: Tensor, index_RC: Tensor, S_RG: Tensor, levels: Grid, rows: int
) -> Tensor:
    """One pass, weight by weight, each to the minimum of the parabola that the loss is in it."""
    index, S_RC = index_RC.clone(), spread(S_RG, W_RC.shape[1] // S_RG.shape[1])
    for first in range(0, len(W_RC), rows):
        for c in range(W_RC.shape[1]):
            for r in range(first, min(first + rows, len(W_RC))):
                E_RC = W_RC - levels.levels[index] * S_RC
                slope = F_RR[r] @ E_RC @ H_CC[:, c]
                best = levels.levels[index[r, c]] * S_RC[r, c] + slope / (F_RR[r, r] * H_CC[c, c])
                index[r, c] = levels.nearest((best / S_RC[r, c])[None])[0]
    return index


def test_fisher_matrices_are_summed_in_blocks_of_rows() -> None:
    R = TOGETHER + 76
    G_TR = torch.randn(5, R, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    F_RB = torch.zeros(R, TOGETHER, dtype=torch.float64)
    add_blocks(F_RB, G_TR[:2])
    add_blocks(F_RB, G_TR[2:])
    whole = G_TR.T @ G_TR
    torch.testing.assert_close(F_RB[:TOGETHER], whole[:TOGETHER, :TOGETHER])
    torch.testing.assert_close(F_RB[TOGETHER:, :76], whole[TOGETHER:, TOGETHER:])
    assert F_RB[TOGETHER:, 76:].abs().max() == 0


def test_the_loss_is_the_mean_of_the_gradients_products_with_the_output_errors() -> None:
    generator = torch.Generator().manual_seed(1)
    E_RC, X_TC, G_SR = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((6, 8), (40, 8), (30, 6))
    )
    F_RR = torch.zeros(6, 6, dtype=torch.float64)
    add_blocks(F_RR, G_SR)
    expected = (G_SR @ E_RC @ X_TC.T).square().mean()
    torch.testing.assert_close(loss(E_RC, X_TC.T @ X_TC / 40, F_RR / 30), expected)


@pytest.mark.parametrize("damp", [0.0, 0.5])
def test_damping_is_a_share_of_the_mean_of_the_diagonal(damp: float) -> None:
    F_RR = torch.tensor([[1.0, 2.0], [2.0, 5.0]], dtype=torch.float64)
    torch.testing.assert_close(damped_blocks(F_RR, damp), F_RR / 3 + damp * torch.eye(2, dtype=torch.float64))
    assert torch.equal(damped_blocks(torch.zeros(3, 3)), torch.eye(3)), "outputs that nothing depends on"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "width"), [(12, 64), (5, 7), (1, 64)])
def test_the_codes_are_those_of_the_plain_form(format: GridFormat, rows: int, width: int) -> None:
    W_RC, H_CC, index, S_RG, levels = start(format)
    F_RR = fisher(12)
    found = descend_together(W_RC, H_CC, F_RR, index, S_RG, levels, passes=1, rows=rows, width=width)
    assert torch.equal(found, plain(W_RC, H_CC, F_RR, index, S_RG, levels, rows))
    assert not torch.equal(found, index)


def test_rows_of_which_none_weighs_another_descend_alone() -> None:
    W_RC, H_CC, index, S_RG, levels = start("nf4")
    weigh_R = torch.rand(12, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.1
    found = descend_together(W_RC, H_CC, weigh_R.diag(), index, S_RG, levels, passes=1)
    assert torch.equal(found, descend(W_RC, H_CC, index, S_RG, levels))


@pytest.mark.parametrize("format", FORMATS)
def test_the_loss_falls_from_pass_to_pass_until_no_code_can_be_changed_for_the_better(
    format: GridFormat,
) -> None:
    W_RC, H_CC, index, S_RG, levels = start(format, R=6)
    F_RR, lost = fisher(6), list[float]()
    for _ in range(200):
        lost.append(float(loss(errors(W_RC, index, S_RG, levels), H_CC, F_RR)))
        moved = descend_together(W_RC, H_CC, F_RR, index, S_RG, levels, passes=1)
        if torch.equal(moved, index):
            break
        index = moved
    assert torch.equal(moved, index), "it does not stop"
    assert len(lost) > 2 and all(later < earlier for earlier, later in itertools.pairwise(lost))
    for r in range(6):
        for c in range(0, 64, 9):
            for level in range(len(levels.levels)):
                other = index.clone()
                other[r, c] = level
                assert float(loss(errors(W_RC, other, S_RG, levels), H_CC, F_RR)) >= lost[-1] * (1 - 1e-12)


def test_blocks_of_rows_descend_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    W_RC, H_CC, index, S_RG, levels = start("nf4")
    monkeypatch.setattr("llmcompress.algorithms.two_sided.TOGETHER", 8)
    F_RB = torch.cat([fisher(8), torch.zeros(4, 8, dtype=torch.float64)])
    F_RB[8:, :4] = fisher(4, seed=1)
    found = descend_together(W_RC, H_CC, F_RB, index, S_RG, levels)
    apart = [
        descend_together(W_RC[rows], H_CC, F_RR, index[rows], S_RG[rows], levels)
        for rows, F_RR in ((slice(0, 8), fisher(8)), (slice(8, 12), fisher(4, seed=1)))
    ]
    assert torch.equal(found, torch.cat(apart))


def test_dead_columns_and_dead_rows_are_left_alone() -> None:
    W_RC, H_CC, index, S_RG, levels = start("nf4")
    F_RR = fisher(12)
    H_CC[5], H_CC[:, 5], F_RR[3], F_RR[:, 3] = 0, 0, 0, 0
    found = descend_together(W_RC, H_CC, F_RR, index, S_RG, levels)
    assert torch.equal(found[:, 5], index[:, 5]) and torch.equal(found[3], index[3])
    assert not torch.equal(found, index)


def test_a_linear_solved_under_the_fisher_matrix_loses_less_by_it() -> None:
    W_RC, H_CC = (part.float() for part in problem(5))
    F_RR = fisher(32).float()
    plainly, together = (solve(W_RC, H_CC, grid("nf4"), 32, F_RB=F) for F in (None, F_RR))
    lost = [float(loss(W_RC - found.weight(grid("nf4")), H_CC, F_RR)) for found in (plainly, together)]
    assert lost[1] < 0.8 * lost[0]
